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
