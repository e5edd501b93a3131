"""What slimming shows on a terminal, and `inspect` of a slimmed folder."""

from __future__ import annotations

import copy

from compress.cli import _inspection, _render, _slimming
from compress.cli._tables import Table, to_plain

from ..slimmed import slimmed_details


def _shown(report, **changes):
    document = copy.deepcopy(report)
    document["stages"] = [{**report["stages"][0], "method": "slimsam", "details": slimmed_details(**changes)}]
    return "\n".join(to_plain(section) for section in _render.report(document))


def _lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_widths_costs_and_phases_are_tables(report):
    lines = _lines(_shown(report))
    for line in (
        "slimsam: widths", "residual stream 1 768 384 50.0%", "channels of a head, 12 heads 12 64 32 50.0%",
        "feed-forward 12 3,072 1,536 50.0%", "parameters 93.74 M 27.96 M 29.8%",
        "MACs of the image encoder 483.6 G 152.2 G 31.5%",
        "the same without attention products (paper) 368.7 G 94.79 G 25.7%",
        "after error of the output mIoU", "original 0 0.7301", "bottleneck aligning 0.00287 0.7123",
    ):  # fmt: skip
        assert line in lines


def test_without_masks_there_is_no_column_for_them(report):
    text = _shown(report, masks=False)
    assert "mIoU" not in text and "chosen by the output error of 50" in " ".join(text.split())
    assert "after error of the output" in _lines(text)


def test_nothing_is_wider_than_a_terminal():
    for changes in ({}, {"masks": False}, {"uniform": False, "layers": 32}):
        stage = {"method": "slimsam", "details": slimmed_details(**changes)}
        for section in _slimming.sections({"stages": [stage]}):
            assert max(map(len, to_plain(section).splitlines())) <= 80


def test_what_was_measured_between_stages_is_told():
    measured = {"mask_agreement": 0.9123, "sqnr_db": 12.5, "miou": 0.7, "miou_original": 0.73}
    stage = {"method": "slimsam", "details": {**slimmed_details(), "measured": measured}}
    last = " ".join(list(_slimming.sections({"stages": [stage]}))[-1].split())
    assert last == (
        "slimsam: right after it, on held-out images: agreement of masks with the original's 0.9123; mIoU"
        " with true masks 0.7000; SQNR of the embedding 12.50 dB"
    )


def test_other_stages_say_nothing(report):
    assert list(_slimming.sections(report)) == []


def test_inspect_shows_widths_and_costs(tmp_path):
    from compress.exporters.inspection import inspect

    from ..tiny_sam import save_tiny_sam

    document = inspect(save_tiny_sam(tmp_path / "sam"))
    assert (document["class"], document["format"], document["cut"]) == ("SamModel", "dense", 0)
    document["history"] = [
        {
            "method": "slimsam",
            "seed": 0,
            "settings": {"ratio": 0.5},
            "details": slimmed_details(uniform=False),
        }
    ]
    tables = [section for section in _inspection.sections(document) if isinstance(section, Table)]
    rows = next(table.rows for table in tables if table.title == "slimsam: widths")
    assert ["feed-forward", "12", "3,072", "960 to 2,016", "48.4%"] in [list(row) for row in rows]
    assert any("MACs of the image encoder" in row for table in tables for row in table.rows)
