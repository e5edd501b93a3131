"""Access tokens: found where they must not stand, and blotted out of what is printed or written.

A token belongs in the environment or in the Hub library's own store. A recipe is copied into the
checkpoint that it makes, so one with a token in it is refused; and everything that leaves this
program as text passes `redact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

MASK = "***"

_TOKEN_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "HUGGINGFACEHUB_API_TOKEN",
    "GITHUB_TOKEN",
    "GH_TOKEN",
    "CI_JOB_TOKEN",
    "ACTIONS_RUNTIME_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
)
_URL_VARIABLES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy")
# Shorter values are placeholders; blotting them out would take harmless words with them.
_SHORTEST = 8
_TOKEN = re.compile(
    r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{16,}"
    r"|\bgh[oprsu]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bglpat-[\w-]{16,}"
)
# The user part alone may be a token as well; the part before the colon never has a slash.
_USER_INFO = re.compile(r"(?<=://)[^\s/@\"'<>]+@")
_HEADER = re.compile(r"(?i)\b(bearer|authorization.{1,6}basic)\s+[\w.~+/=-]{8,}")
_SIGNED = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|sig|policy|token)=)[^&\s\"'<>]+"
)


def _values() -> Iterator[str]:
    """Yield the tokens and passwords that this process can know."""
    for name in _TOKEN_VARIABLES:
        yield os.environ.get(name, "").strip()
    for name in _URL_VARIABLES:
        user, _, rest = os.environ.get(name, "").partition("://")[2].partition("@")
        if rest:
            yield from map(unquote, user.split(":", 1))
    yield _stored_token()


def _stored_token() -> str:
    """Return the token that the Hub library keeps for this user, or nothing."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(cache, "huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # none, or not for us: then it cannot be in our texts either
        return ""


def _known() -> list[str]:
    """Return the known values and their form in a URL, the longest first."""
    values = {value for value in _values() if len(value) >= _SHORTEST}
    values |= {quote(value, safe="") for value in values}
    return sorted(values, key=len, reverse=True)


def redact(text: str) -> str:
    """Return `text` with every token, password in a URL and signature replaced by `***`."""
    for value in _known():
        text = text.replace(value, MASK)
    text = _USER_INFO.sub(MASK + "@", text)
    text = _HEADER.sub(rf"\1 {MASK}", text)
    text = _SIGNED.sub(rf"\1{MASK}", text)
    return _TOKEN.sub(MASK, text)


def holds_secret(text: str) -> bool:
    """Return whether `text` holds an access token, or a URL with a password in it."""
    return secret_position(text) is not None


def secret_position(text: str) -> int | None:
    """Return where in `text` the first token or URL with a password starts, or None."""
    found = [position for value in _known() if (position := text.find(value)) >= 0]
    found += [match.start() for match in _TOKEN.finditer(text)]
    found += [match.start() for match in _USER_INFO.finditer(text) if match[0] != MASK + "@"]
    return min(found, default=None)


def without_user_info(url: str) -> str:
    """Return a URL without user name and password, as it may be shown and stored."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
