"""How library code tells what it is doing: it never prints, it calls a `Progress`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a long operation reports to; the command line draws it, tests record it."""

    def start(self, label: str, total: int | None) -> None:
        """Begin a step of `total` units (None: unknown); steps nest."""

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Finish `units` of the innermost step; `detail` names what is being worked on."""

    def finish(self, completed: bool = True) -> None:
        """End the innermost step; `completed` is false when an error ended it."""

    def note(self, message: str) -> None:
        """Tell something that the user should see but that is no error."""

    def warn(self, message: str) -> None:
        """Tell something that may be wrong; `--strict` runs turn it into a failure."""


class SilentProgress:
    """Reports nothing; the default of the Python interface."""

    def start(self, label: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Ignore."""

    def finish(self, completed: bool = True) -> None:
        """Ignore."""

    def note(self, message: str) -> None:
        """Ignore."""

    def warn(self, message: str) -> None:
        """Ignore."""


@contextmanager
def step(progress: Progress, label: str, total: int | None = None) -> Iterator[Progress]:
    """Open a step and close it however the body ends."""
    progress.start(label, total)
    completed = False
    try:
        yield progress
        completed = True
    finally:
        progress.finish(completed)


def track(progress: Progress, label: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """Yield `items`, advancing one unit after each."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with step(progress, label, total):
        for item in items:
            yield item
            progress.advance()
