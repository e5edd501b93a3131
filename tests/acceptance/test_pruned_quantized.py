"""Acceptance: a DiT that is pruned and then quantized in one recipe, resumed, verified and measured again."""

from __future__ import annotations

import json

import compress
import pytest
from compress.exporters.inspection import inspect
from compress.exporters.verify import verify_folder
from compress.pipeline import evaluate
from compress.progress import SilentProgress

PRUNE = {"isomorphic": {"ratios": {"ff": 0.4, "heads": 0.25, "head_dim": 0.25}, "round_to": 4}}
QUANTIZE = {"vidit_q": {"weight_bits": 4, "activation_bits": 8, "group_size": None}}
TEXTS = ("compress.json", "config.json", "pruning.json", "diffusion_pytorch_model.safetensors")


def recipe(folder, stages, out):
    return {
        "model": str(folder), "stages": stages, "export": {"path": str(out)},
        "calibration": {"samples": 2, "steps": 2}, "evaluate": {"fidelity": {"samples": 2, "steps": 2}},
    }  # fmt: skip


@pytest.mark.slow
def test_both_in_one_recipe(tiny_dit, tmp_path):
    pruned = compress.run(recipe(tiny_dit, [PRUNE], tmp_path / "pruned"), work_dir=tmp_path / "work")
    assert pruned["export"]["verified"] and pruned["export"]["max_abs_error"] == 0.0
    assert "pruning.json" in {row["name"] for row in pruned["export"]["files"]}
    assert pruned["stages"][0]["after"]["parameters"] < pruned["stages"][0]["before"]["parameters"]

    both = compress.run(recipe(tiny_dit, [PRUNE, QUANTIZE], tmp_path / "both"), work_dir=tmp_path / "work")
    assert [stage["resumed"] for stage in both["stages"]] == [True, False]
    assert both["stages"][1]["before"] == pruned["stages"][0]["after"]
    assert both["export"]["verified"] and both["export"]["max_abs_error"] == 0.0
    assert verify_folder(tmp_path / "both")["verified"]
    described = inspect(tmp_path / "both")
    assert described["cut"] > 0 and described["quantized_bits"] == 4.0

    again = compress.run(recipe(tiny_dit, [PRUNE, QUANTIZE], tmp_path / "again"), work_dir=tmp_path / "other")
    assert [stage["resumed"] for stage in again["stages"]] == [False, False]
    for name in TEXTS:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "both" / name).read_bytes(), name

    measured = evaluate(None, tmp_path / "both", SilentProgress())
    recorded = json.loads((tmp_path / "both" / "report.json").read_text())["evaluation"]["metrics"]
    assert measured["evaluation"]["metrics"] == recorded
