"""The last door for text: what any code writes to stdout or stderr leaves without tokens.

Our own messages are redacted where they are made. Libraries write warnings and log lines of their own,
and the interpreter writes tracebacks; they all write to `sys.stdout` and `sys.stderr`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from ..recipes.secrets import redact


class RedactedStream:
    """A text stream in front of another one; everything but writing is the other one's.

    Args:
        inner: where the text goes.
    """

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        """Write without tokens; returns the length of what was given, as callers expect."""
        self._inner.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line without tokens."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __iter__(self) -> Any:
        return iter(self._inner)

    def __enter__(self) -> RedactedStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()


def guard_streams() -> None:
    """Put the door before `sys.stdout` and `sys.stderr` of this process, once."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, cast(TextIO, RedactedStream(stream)))
