"""What the Hub's library raises, turned into one error of ours that says what to do. Torch-free.

Nothing of the library is imported before something went wrong or is about to be tried, and no text of
it reaches a message with a token or a signed URL in it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import HubError
from ..recipes.secrets import redact

_TOKEN_HINT = "set HF_TOKEN, or log in with `hf auth login`"
_AGAIN = "run the same command again later; what was uploaded is not sent again"
_BY_STATUS = {
    401: ("the token is not accepted", "check HF_TOKEN, which goes before a stored login; " + _TOKEN_HINT),
    402: ("the Hub wants a payment first", "see the billing page of the account or organisation"),
    403: ("not permitted", "use a token with write access to the repository, in HF_TOKEN"),
    404: ("not found on the Hub", "check the name and HF_ENDPOINT"),
    409: (
        "it exists already, or something else is being done to it",
        "look at it on the Hub, then try again",
    ),
    412: ("the branch moved meanwhile", "push again; what was uploaded is not sent again"),
    413: ("too large for the Hub", "lower export.max_shard_size"),
    429: ("too many requests", _AGAIN),
}
# These say something about this machine's disk, not about the Hub.
_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS})


def library_errors() -> tuple[type[BaseException], ...]:
    """Return the types of error that calls of the Hub's library end with, whichever HTTP client it uses."""
    from huggingface_hub.errors import HfHubHTTPError

    # Checks of the library are ValueErrors; a failed upload of one file is a RuntimeError around its cause.
    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what the library raises in the body into a `HubError`.

    Args:
        what: repository and action, the start of the message.

    Raises:
        HubError: the Hub or the network refused.
        OSError: the local disk is full or refuses.
    """
    try:
        yield
    except HubError:
        raise
    except library_errors() as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise
        raise hub_error(error, what) from None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def innermost(error: BaseException) -> BaseException:
    """Return the error that the library wrapped into a RuntimeError, or the error itself."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def hub_error(error: BaseException, what: str) -> HubError:
    """Say what an error of the Hub's library means.

    Args:
        error: what the library raised.
        what: repository and action, the start of the message, such as `org/name@v1`.

    Returns:
        The error to raise; its text holds no token and no signed URL.
    """
    from huggingface_hub import errors

    error = innermost(error)
    status = status_of(error)
    if isinstance(error, errors.LocalTokenNotFoundError):
        told, hint = "there is no access token", _TOKEN_HINT
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        told = f"cannot be fetched and is not in the local cache: {first_line(error)}"
        hint = "check the network, HF_HUB_OFFLINE and HF_TOKEN, or use a folder or builtin:dit"
    elif isinstance(error, errors.RepositoryNotFoundError):  # gated ones too
        told = f"not found on the Hub, or not open to you: {first_line(error)}"
        hint = "check the name; for a private or gated model set HF_TOKEN, or accept its terms on its page"
    elif isinstance(error, errors.RevisionNotFoundError):
        told, hint = "no such revision", "check the revision: in a recipe model.revision or push.revision"
    elif isinstance(error, errors.HFValidationError):
        told, hint = f"not a Hub id: {first_line(error)}", "write it as org/name"
    elif status is not None:
        told, hint = _by_status(error, status)
    elif isinstance(error, ValueError):  # checks of the library itself, such as of the card's metadata
        told = f"the Hub's library refused: {redact(' '.join(str(error).split()))[:500]}"
        hint = "nothing was committed; what is named there has to change first"
    else:
        told = f"the Hub cannot be reached: {type(error).__name__}: {first_line(error)}"
        hint = "check the network, HF_ENDPOINT and proxies, then run the same command again"
        if "xet-write-token" in told:
            hint = "a Hub without Xet storage wants HF_HUB_DISABLE_XET=1"
    return HubError(redact(f"{what}: {told}"), hint=hint)


def _by_status(error: BaseException, status: int) -> tuple[str, str]:
    """Return what a status means and what to do about it."""
    if status >= 500:
        told, hint = "the Hub failed", f"check the network; {_AGAIN}"
    else:
        told, hint = _BY_STATUS.get(status, ("the Hub refused", "see what it says about the request"))
    return f"{told} ({_server_said(error, status)})", hint


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without tokens."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])


def _server_said(error: Any, status: int) -> str:
    """Return the status and what the server said about it."""
    said = str(getattr(error, "server_message", None) or "").strip()
    return f"{status}: {said.splitlines()[0]}" if said else str(status)
