"""Acceptance of whole runs that end in a cut model: quantized on top of it, and padded beside it.

What a run exports is verified in fresh processes, and measured again from the folder alone.
"""

from __future__ import annotations

import json

import compress
import pytest
import torch
from compress.exporters.inspection import inspect
from compress.exporters.verify import verify_folder
from compress.pipeline import evaluate
from safetensors.torch import save_file

PRUNE = {"isomorphic": {"ratios": {"ff": 0.4, "heads": 0.25, "head_dim": 0.25}, "round_to": 4}}
QUANTIZE = {"vidit_q": {"weight_bits": 4, "activation_bits": 8, "group_size": None}}


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


@pytest.mark.slow
def test_padded_beside_the_pruned_one(make_vit, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 16, 16, 3), generator=generator, dtype=torch.uint8)
    save_file({"pixels": pixels, "labels": torch.arange(60) % 10}, tmp_path / "images.safetensors")
    ours, padded = tmp_path / "ours", tmp_path / "padded"
    stage = {
        "isomorphic": {
            "ratios": {"width": 0.25, "ff": 0.4, "heads": 0.25, "head_dim": 0.25},
            "importance": "magnitude", "round_to": 2, "normalizer": "none",
        }
    }  # fmt: skip
    compress.run(
        {
            "model": str(make_vit()), "stages": [stage],
            "calibration": {"samples": 4, "images": str(tmp_path / "images.safetensors")},
            "evaluate": {"fidelity": {"samples": 8}},
            "export": [{"path": str(ours)}, {"path": str(padded), "padded": True}],
        },
        work_dir=tmp_path / "work",
    )  # fmt: skip
    first, second = (json.loads((path / "report.json").read_text()) for path in (ours, padded))
    assert first["export"]["verified"] and second["export"]["verified"]
    ways = second["export"]["loads_with"]
    assert any("transformers." in way and "import compress" not in way for way in ways)
    sizes = [report["evaluation"]["metrics"]["parameters"] for report in (first, second)]
    assert inspect(padded)["parameters"] == sizes[1] >= sizes[0] == inspect(ours)["parameters"]
    assert any("padded" in note for note in second["export"]["notes"])
    assert "padded" in (padded / "README.md").read_text()
    recorded = second["evaluation"]["metrics"]
    measured = evaluate(padded)["evaluation"]["metrics"]
    assert {name: measured[name] for name in ("parameters", "macs", "bytes")} == {
        name: recorded[name] for name in ("parameters", "macs", "bytes")
    }
