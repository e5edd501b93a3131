"""Progress as the command line shows it: bars on a terminal, throttled lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from ..recipes.secrets import redact
from ._redaction import guard_streams
from ._units import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

LINE_SECONDS = 10.0


@dataclass
class _Step:
    label: str
    total: int | None
    started: float
    done: int = 0


class PlainProgress:
    """Lines for CI logs: outer steps when they begin and end, inner ones at most every 10 seconds.

    Args:
        write: takes one line.
        quiet: only warnings are written.
        on_start: called when the first step begins: from then on there is something to resume.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        write: Callable[[str], None],
        *,
        quiet: bool = False,
        on_start: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._quiet, self._on_start, self._clock = write, quiet, on_start, clock
        self._steps: list[_Step] = []
        self._last = clock()

    def _line(self, text: str) -> None:
        self._last = self._clock()
        if not self._quiet:
            self._write(text)

    def start(self, label: str, total: int | None) -> None:
        """Begin a step."""
        self._on_start()
        self._steps.append(_Step(label, total, self._clock()))
        if len(self._steps) == 1:
            self._line(f"{label} ...")

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Finish units of the innermost step; writes a line when the last one is 10 seconds old."""
        if not self._steps:
            return
        step = self._steps[-1]
        step.done += units
        now = self._clock()
        if now - self._last < LINE_SECONDS:
            return
        count = f"{step.done}/{step.total}" if step.total else str(step.done)
        left = ""
        if step.total and 0 < step.done < step.total:
            left = f", about {duration((now - step.started) / step.done * (step.total - step.done))} left"
        path = " > ".join(item.label for item in self._steps)
        self._line(f"{path}: {count}{left}{' - ' + detail if detail else ''}")

    def finish(self, completed: bool = True) -> None:
        """End the innermost step; an outermost one that was completed writes a line."""
        step = self._steps.pop()
        if completed and not self._steps:
            self._line(f"{step.label}: done in {duration(self._clock() - step.started)}")

    def note(self, message: str) -> None:
        """Write a note."""
        self._line(message)

    def warn(self, message: str) -> None:
        """Write a warning, also when quiet."""
        self._write(f"warning: {message}")


@dataclass
class _Bar:
    """An open step on the terminal: its row, and whether the row has anything to count."""

    label: str
    task: TaskID
    started: float
    counts: bool


class RichProgress:
    """Bars on a terminal: one per open step, with detail and time left; finished steps leave a line.

    A step that counts nothing itself has no row while another one runs inside it: that one's row is
    labelled with both.

    Args:
        console: of stderr.
        on_start: called when a step begins.
    """

    def __init__(self, console: Console, *, on_start: Callable[[], None] = lambda: None) -> None:
        from ._bars import bars

        self._on_start = on_start
        self._console = console
        self._bars = bars(console)
        self._steps: list[_Bar] = []

    def close(self) -> None:
        """Remove what is drawn; the terminal is as before."""
        self._bars.stop()

    def start(self, label: str, total: int | None) -> None:
        """Begin a step."""
        self._on_start()
        self._bars.start()
        guard_streams()  # while bars are drawn, rich has put streams of its own in their place
        label = redact(label)
        if self._steps and not self._steps[-1].counts:
            self._bars.update(self._steps[-1].task, visible=False)
        task = self._bars.add_task(self._described(label), total=total, detail="")
        self._steps.append(_Bar(label, task, time.monotonic(), total is not None))

    def _described(self, label: str) -> str:
        """Put the labels of hidden rows before a label; shift it in under those that are seen."""
        hidden = list(takewhile(lambda bar: not bar.counts, reversed(self._steps)))[::-1]
        shown = sum(bar.counts for bar in self._steps)
        return "  " * shown + " > ".join([*(bar.label for bar in hidden), label])

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Finish units of the innermost step."""
        if self._steps:
            self._steps[-1].counts = True
            self._bars.update(self._steps[-1].task, advance=units, detail=redact(detail))

    def finish(self, completed: bool = True) -> None:
        """End the innermost step; an outermost one that was completed leaves a line."""
        bar = self._steps.pop()
        self._bars.remove_task(bar.task)
        if self._steps:
            self._bars.update(self._steps[-1].task, visible=True)
            return
        self._bars.stop()
        if completed:
            self._print(f"{bar.label}  {duration(time.monotonic() - bar.started)}", "green")

    def note(self, message: str) -> None:
        """Print above the bars."""
        self._print(message, "")

    def warn(self, message: str) -> None:
        """Print above the bars."""
        self._print(f"warning: {message}", "yellow")

    def _print(self, text: str, style: str) -> None:
        self._console.print(redact(text), style=style, markup=False, highlight=False)
