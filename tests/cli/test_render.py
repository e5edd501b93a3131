"""Tables in three forms; numbers for people; documents of any shape."""

from __future__ import annotations

import pytest
from compress.cli import _render
from compress.cli._tables import Table, to_markdown, to_plain, to_rich
from compress.cli._units import amount, duration, plain, size

TABLE = Table("sizes", ["name", "bytes"], [["a|b", "1"], ["long name", "22"]])


def test_plain():
    assert to_plain(TABLE) == "sizes\n  name       bytes\n  a|b        1\n  long name  22"
    assert to_plain("a line") == "a line"


def test_markdown():
    assert to_markdown(TABLE).splitlines()[2:] == [
        "| name | bytes |",
        "| --- | --- |",
        "| a\\|b | 1 |",
        "| long name | 22 |",
    ]
    assert to_markdown(Table("", ["x"], [["two\nlines"]])).endswith("| two lines |")


def test_rich_keeps_brackets():
    table = to_rich(Table("", ["x"], [["[red]"]]))
    assert table.columns[0]._cells[0].plain == "[red]"


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (size, 0, "0 B"), (size, 999, "999 B"), (size, 5_600_000, "5.6 MB"), (size, 1.35e9, "1.35 GB"),
        (size, 2e15, "2e+03 TB"), (amount, 675_129_632, "675.1 M"), (amount, 12, "12"),
        (amount, 1.187e11, "118.7 G"),
        (duration, 0.42, "0.4 s"), (duration, 59.4, "59 s"), (duration, 185, "3 min 05 s"),
        (duration, 7800, "2 h 10 min"),
        (plain, None, "-"), (plain, True, "yes"), (plain, 0.123456, "0.1235"), (plain, [1, "a"], "1, a"),
        (plain, {"a": 1.0}, "a 1"),
    ],
)  # fmt: skip
def test_numbers(write, value, text):
    assert write(value) == text


def test_before_after_needs_what_both_have(report):
    first = report["stages"][0]["before"]
    table = _render.before_after(first, {"bytes": 2_800_000})
    assert table.rows == [["bytes", "5.6 MB", "2.8 MB", "0.500 x"]]


ALLOCATION = {
    "asked": {"ratio": 0.25, "mean_bits": 4.0},
    "used": {"bytes": 1_435_680, "bytes_limit": 1_500_000, "mean_bits": 3.98, "mean_bits_stored": 4.2708},
    "groups": [{"histogram": {"2": 4, "16": 1}}, {"histogram": {"2": 3, "4": 33}}],
    "chosen": "least sum of powers",
    "bound": {
        "point": "least sum of powers", "loss": 0.000612185, "lower_bound": 0.0006121, "certificate": "highs",
        "gap_of_range": 2e-6, "stopped": "optimal",
    },
}  # fmt: skip


def test_a_stage_that_chose_bits_tells_budget_bound_and_layers(report):
    plain_lines = [line for line in _render.report(report) if isinstance(line, str)]
    report["stages"][-1]["details"] = {"allocation": ALLOCATION}
    first, second = (line for line in _render.report(report)[1:3] if isinstance(line, str))
    name = report["stages"][-1]["method"]
    assert first == (
        f"{name}: used 1,435,680 of 1,500,000 bytes (ratio 0.25) and 3.98 of 4 mean bits"
        " (4.271 with scales); allocated layers at each number of bits: 7 at 2, 33 at 4, 1 at 16"
    )
    assert second == (
        f"{name}: least sum of powers: loss 0.000612185, lower bound 0.0006121 (highs), gap 2.0e-06 of the"
        " range, proven optimal"
    )
    assert len([line for line in _render.report(report) if isinstance(line, str)]) == len(plain_lines) + 2


def test_a_better_measured_answer_and_a_missing_proof_are_told(report):
    bound = {**ALLOCATION["bound"], "stopped": "limit"}
    used = {**ALLOCATION["used"], "bytes_limit": None}
    report["stages"][-1]["details"] = {
        "allocation": {
            **ALLOCATION,
            "asked": {"mean_bits": 4.0},
            "used": used,
            "bound": bound,
            "chosen": "all w4",
        }
    }
    first, second = _render.report(report)[1:3]
    assert "used 1,435,680 bytes and 3.98 of 4 mean bits (" in first
    assert second.endswith("stopped at its limit, not proven optimal; taken: all w4, which measured better")


def test_a_report_without_stages_or_gates(report):
    report["stages"], report["gates"], report["export"]["verified"] = [], [], False
    sections = _render.report(report)
    assert len(sections) == 2 and "NOT verified" in sections[1]


def test_anything():
    document = {
        "path": "out",
        "total_bytes": 1500,
        "model": {"id": "m", "ok": True},
        "layers": [{"name": "a", "bits": 4}, {"name": "b", "bytes": 2000}],
        "empty": [],
    }
    head, model, layers = _render.anything(document)
    assert list(head.rows) == [["path", "out"], ["total_bytes", "1.5 kB"], ["empty", ""]]
    assert model.title == "model" and model.rows[1] == ["ok", "yes"]
    assert layers.columns == ["name", "bits", "bytes"] and layers.rows == [
        ["a", "4", "-"],
        ["b", "-", "2 kB"],
    ]
