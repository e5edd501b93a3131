"""A slimmed model is measured by its masks: told, drawn, and found again by evaluate, verify and a rerun."""

from __future__ import annotations

import json

import compress
import pytest
from compress.exporters.figures import MASKS
from compress.pipeline import evaluate, reproduce, verify

from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import write_parts

_METRICS = ("sqnr_db", "mask_agreement", "miou", "miou_original", "miou_drop")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    write_parts(folder / "images", 12, 10, objects=2)
    recipe = {
        "model": str(save_tiny_sam(folder / "model")),
        "calibration": {"images": str(folder / "images"), "samples": 6},
        "stages": [{"slimsam": {"ratio": 0.5, "steps": 3, "choice_images": 2}}],
        "evaluate": {"fidelity": {"samples": 7}, "quality": {"samples": 8}, "speed": {"rounds": 2}},
        "require": {"mask_agreement": ">= 0.01"},
        "export": {"path": str(folder / "out")},
    }
    return folder, compress.run(recipe, work_dir=folder / "work")


def test_the_report_and_the_card_tell_of_masks(made):
    folder, report = made
    found = report["evaluation"]
    assert all(name in found["metrics"] for name in _METRICS)
    assert 0 < found["metrics"]["mask_agreement"] < 1, "it was slimmed"
    assert found["segmentation"]["fidelity"]["prompts"] == 28
    assert found["segmentation"]["quality"]["masks"] == 16
    assert found["speed"]["encoder"]["seconds"] > 0
    assert "layers" not in found
    assert [gate["passed"] for gate in report["gates"]] == [True]
    card = (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert (folder / "out" / MASKS).is_file() and f"]({MASKS})" in card
    assert "| masks held against the original's at random points, mean IoU | 1 |" in card
    assert "denoiser" not in card


def test_the_figures_are_measured_again(made):
    folder, report = made
    before = report["evaluation"]
    again = evaluate(folder / "out")["evaluation"]
    assert {name: again["metrics"][name] for name in _METRICS} == {
        name: before["metrics"][name] for name in _METRICS
    }
    assert json.loads(json.dumps(again["segmentation"])) == before["segmentation"]
    found = verify(folder / "out", against=str(folder / "model"))
    assert found["verified"]
    assert {row["metric"] for row in found["metrics"] if row["agrees"]} >= set(_METRICS)


def test_the_picture_comes_out_again(made):
    folder, _ = made
    found = reproduce(folder / "out", work_dir=folder / "again")
    assert found["reproduced"] and MASKS in {row["name"] for row in found["files"]}
