"""Progress without a terminal is throttled; nested steps are told as a path; quiet keeps warnings."""

from __future__ import annotations

import io
import re
import time

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


def drawn(stream):
    """Return the last frame that was drawn, as lines of text."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue().rpartition("\x1b[2K")[2])
    return [
        re.sub(r"(?<=\S) +", " ", line.rstrip())
        for line in text.replace("\r", "").splitlines()
        if line.strip()
    ]


def test_a_long_detail_leaves_bar_and_time_at_80_columns():
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=80))
    with step(progress, "finetune"), step(progress, "training", 313):
        progress.advance(130, "loss 0.2294, labels 1.286, original 0.1121, lr 0.000683, step 130 of 313")
        time.sleep(0.01)
        progress.advance(1, "loss 0.2294, labels 1.286, original 0.1121, lr 0.000683, step 131 of 313")
        progress._bars.refresh()
        (line,) = drawn(stream)
    progress.close()
    assert line.startswith("finetune > training ━━━━━━") and " 131/313 " in line and " s left " in line
    assert "loss 0.2294" in line and line.endswith("…") and len(line) <= 80


def test_a_step_that_counts_nothing_has_no_row_while_another_runs_inside():
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=80))
    with step(progress, "finetune"):
        progress._bars.refresh()
        (line,) = drawn(stream)
        assert line.startswith("finetune ━") and "0/?" not in line and line.endswith(" s")
        with step(progress, "answers", 4), step(progress, "images"):
            progress._bars.refresh()
            outer, inner = drawn(stream)
            assert outer.startswith("finetune > answers ━") and " 0/4 " in outer
            assert inner.startswith("  images ━")
        progress.advance(2)
        with step(progress, "more", 1):
            progress._bars.refresh()
            outer, inner = drawn(stream)
            assert outer.startswith("finetune ━") and " 2 " in outer and inner.startswith("  more ━")
    progress.close()
