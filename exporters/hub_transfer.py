"""How calls of the Hub's library are made: repeated where that helps, and heard through our `Progress`.

The library repeats the parts of an upload itself; what it does not repeat (creating repositories,
commits, branches and tags) is repeated here.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

from ..progress import Progress
from ..recipes.secrets import redact
from ..runtime.hub_errors import first_line, innermost, library_errors, status_of, translated

T = TypeVar("T")

ATTEMPTS = 6
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 1.0, 8.0
_LONGEST_ASKED_SECONDS = 300.0  # a Hub that wants more patience than this is left for another day
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
# After these a call may have had its effect although no good answer came.
_UNCLEAR = _PASSING | {409, 412}


def attempt(
    what: str,
    call: Callable[[], T],
    *,
    progress: Progress,
    done: Callable[[], T | None] = lambda: None,
    attempts: int = ATTEMPTS,
) -> T:
    """Make a call, again while the network or the Hub is only passingly unwell.

    Args:
        what: repository and action, for notes and errors.
        call: one request or a few.
        progress: told before every repetition.
        done: asked after a failure whose answer may have been lost; returns the result of a call that
            had its effect all the same, so that nothing is done twice.
        attempts: how often the call is made at most.

    Raises:
        HubError: the call failed for good.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

    def once() -> T:
        try:
            return call()
        except library_errors() as error:
            unclear = is_passing(error) or status_of(innermost(error)) in _UNCLEAR
            result = done() if unclear else None
            if result is None:
                raise
            return result

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        reason = status_of(error) if error and status_of(error) else first_line(error or OSError("no answer"))
        progress.note(redact(f"{what}: {reason}; trying again in {pause:g} s"))

    retrying = Retrying(
        retry=retry_if_exception(is_passing),
        wait=_pause_seconds,
        stop=stop_after_attempt(attempts),
        before_sleep=tell,
        reraise=True,
    )
    with translated(what):
        return retrying(once)


def is_passing(error: BaseException) -> bool:
    """Return whether an error may be gone when the same call is made again."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    error = innermost(error)
    status = status_of(error)
    if status is not None:
        return status in _PASSING and _asked_seconds(error) <= _LONGEST_ASKED_SECONDS
    if isinstance(error, OfflineModeIsEnabled):
        return False
    # An error page in the place of JSON is what proxies before an overloaded server send. Downloads
    # end with a LocalEntryNotFoundError, after the library has repeated them itself.
    return isinstance(error, HfHubHTTPError.__bases__[0] | json.JSONDecodeError)


def _asked_seconds(error: Any) -> float:
    """Return how long the Hub asks to wait, 0 where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers) if status_of(error) == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = str(headers.get("retry-after", "")).strip()
    return float(asked) if asked.isdecimal() else 0.0


def _pause_seconds(state: Any) -> float:
    """Return how long to wait before the next attempt: doubling, or as long as the Hub asks."""
    pause = min(_FIRST_WAIT_SECONDS * 2 ** (state.attempt_number - 1), _LONGEST_WAIT_SECONDS)
    error = innermost(state.outcome.exception())
    return max(pause, _asked_seconds(error)) if status_of(error) is not None else pause


class _ToProgress(logging.Handler):
    """Passes log lines on as notes, without tokens and signatures."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one line on."""
        self._progress.note(f"Hub: {redact(' '.join(record.getMessage().split()))}")


@contextmanager
def heard_through(progress: Progress) -> Iterator[None]:
    """Let the library speak through `progress` alone: no bars, no log lines, no warnings of its own."""
    from importlib import import_module

    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    states: dict[str, bool] = import_module("huggingface_hub.utils.tqdm").progress_bar_states
    before, logger = dict(states), logging.getLogger("huggingface_hub")
    handlers, propagate = list(logger.handlers), logger.propagate
    show = warnings.showwarning

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "huggingface_hub" in filename:
            progress.note(f"Hub: {redact(str(message))}")
        else:
            show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        disable_progress_bars()
        logger.handlers, logger.propagate = [_ToProgress(progress)], False
        try:
            yield
        finally:
            logger.handlers, logger.propagate = handlers, propagate
            states.clear()
            states.update(before)
