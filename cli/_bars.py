"""The columns of a bar on a terminal: label, bar, count, time, and as much detail as the line holds."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from ._units import duration

_BAR_WIDTH = 20


class _Count(ProgressColumn):
    """`3/10`; of a step without a known end `3`, and nothing before the first unit."""

    def render(self, task: Task) -> Text:
        if task.total is not None:
            return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")
        return Text(f"{task.completed:.0f}" if task.completed else "", style="progress.download")


class _Time(ProgressColumn):
    """The time left; as long as it is not known, the time since the step began."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.time_remaining is not None and task.completed:
            return Text(f"{duration(task.time_remaining)} left", style="progress.remaining")
        return Text(duration(task.elapsed or 0.0), style="progress.elapsed")


def bars(console: Console) -> Progress:
    """Return what draws the bars.

    The detail has the rest of the line and is cut off there: a long one would push the bar out of it.
    """
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=_BAR_WIDTH),
        _Count(table_column=Column(no_wrap=True)),
        _Time(table_column=Column(no_wrap=True)),
        TextColumn(
            "{task.fields[detail]}",
            markup=False,
            style="dim",
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        ),
        console=console,
        transient=True,
        expand=True,
    )
