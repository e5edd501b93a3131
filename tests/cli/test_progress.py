"""Progress without a terminal is throttled; nested steps are told as a path; quiet keeps warnings."""

from __future__ import annotations

import io

from compress.cli._progress import PlainProgress, RichProgress
from compress.progress import step, track
from rich.console import Console


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_are_throttled():
    lines: list[str] = []
    clock = Clock()
    progress = PlainProgress(lines.append, clock=clock)
    with step(progress, "vidit_q"), step(progress, "layers", 30):
        for index in range(30):
            clock.now += 1.0
            progress.advance(detail=f"blocks.{index}")
    assert lines == [
        "vidit_q ...",
        "vidit_q > layers: 10/30, about 20 s left - blocks.9",
        "vidit_q > layers: 20/30, about 10 s left - blocks.19",
        "vidit_q > layers: 30/30 - blocks.29",
        "vidit_q: done in 30 s",
    ]


def test_an_unknown_total():
    lines: list[str] = []
    clock = Clock()
    progress = PlainProgress(lines.append, clock=clock)
    progress.start("search", None)
    clock.now = 11.0
    progress.advance(3)
    assert lines[-1] == "search: 3"


def test_quiet_keeps_warnings():
    lines: list[str] = []
    progress = PlainProgress(lines.append, quiet=True)
    for _ in track(progress, "x", range(3)):
        progress.note("n")
    progress.warn("w")
    assert lines == ["warning: w"]


def test_on_start_is_called():
    calls: list[int] = []
    progress = PlainProgress(lambda line: None, on_start=lambda: calls.append(1))
    assert not calls
    progress.advance()  # outside a step: nothing to count, nothing to break
    progress.start("x", 1)
    assert calls


def test_bars_nest_and_clean_up():
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    with step(progress, "outer [bold]", 1), step(progress, "inner", 2):
        progress.advance(detail="blocks.0 [red]")
        progress.warn("look [here]")
    progress.close()
    text = stream.getvalue()
    assert "outer [bold]" in text and "look [here]" in text and "inner" in text
