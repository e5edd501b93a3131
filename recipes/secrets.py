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
from typing import Any
from urllib.parse import quote, unquote, urlsplit

MASK = "***"

TOKEN_VARIABLES = (
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
# The user part alone may be a token as well, so nothing of it is shown. A password may hold an @ itself: the
# last one before the next slash ends it.
_USER_INFO = re.compile(r"(?<=://)[^\s/\"'<>]+@")
_PASSWORD = re.compile(r"(?<=://)[^\s/:@\"'<>?#]*:[^\s/\"'<>?#]+@")
_TOKEN_LIKE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[\w.~+=-]{16,}", re.ASCII)
_HEADER = re.compile(r"(?i)\b(bearer|authorization.{1,6}basic)\s+[\w.~+/=-]{8,}")
_SIGNED = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|sig|policy|token)=)[^&\s\"'<>]+"
)


def _values() -> Iterator[str]:
    """Yield the tokens and passwords that this process can know."""
    for name in TOKEN_VARIABLES:
        yield os.environ.get(name, "").strip()
    for name in _URL_VARIABLES:
        # A proxy may be given without its scheme.
        user_info = os.environ.get(name, "").rpartition("://")[2].partition("/")[0].rpartition("@")[0]
        user, has_password, password = user_info.partition(":")
        if not has_password and name == "HF_ENDPOINT" and _TOKEN_LIKE.fullmatch(user):
            password = user
        yield from (password, unquote(password))
    yield _stored_token()


def _stored_token() -> str:
    """Return the token that the Hub library keeps for this user, or nothing."""
    try:
        home = os.environ.get("HF_HOME") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface"
        )
        path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
        return path.read_text(encoding="utf-8").strip()
    except RuntimeError:  # a user without a home, as in a container
        return ""
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


def redacted(value: Any) -> Any:
    """Return a JSON value with every text in it, keys too, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def holds_secret(text: str) -> bool:
    """Return whether `text` holds an access token, or a URL with a password in it."""
    return secret_position(text) is not None


def secret_position(text: str) -> int | None:
    """Return where in `text` the first token or URL with a password starts, or None."""
    found = [position for value in _known() if (position := text.find(value)) >= 0]
    found += [match.start() for match in _TOKEN.finditer(text)]
    found += [match.start() for match in _PASSWORD.finditer(text) if not match[0].endswith(f":{MASK}@")]
    return min(found, default=None)


def without_user_info(url: str) -> str:
    """Return a URL without user name and password, as it may be shown and stored."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
