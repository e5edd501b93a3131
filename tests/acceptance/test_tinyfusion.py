"""Learned depth pruning as a user meets it: a run, what it writes, and a second run."""

import json
import subprocess
import sys

import compress
import pytest
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe

from ..small_dits import LIST, equal_embedders, recipe_for


@pytest.fixture
def recipe(make_tiny, tmp_path):
    folder = equal_embedders(make_tiny(num_layers=4, name="four"))
    stages = [
        {"tinyfusion": {"groups": "1:2", "steps": 6, "batch_size": 4, "checkpoint_every": 2}},
        {"distill": {"steps": 4, "batch_size": 4, "lr": 1e-3}},
        {"rtn": {}},
    ]
    return recipe_for(folder, stages, tmp_path / "out")


@pytest.mark.slow
def test_half_of_the_blocks_go_and_the_rest_is_trained_and_quantized(recipe, tmp_path):
    predicted = compress.plan(recipe)
    document = compress.run(recipe, work_dir=tmp_path / "work", progress=SilentProgress())
    search, training, _ = document["stages"]
    kept = search["details"]["blocks"][LIST]["kept"]
    assert len(kept) == 2 and training["details"]["matched"] == {LIST: [[0, 1], [1, 3]]}
    assert predicted["stages"][0]["after"]["parameters"] == search["after"]["parameters"]
    out = tmp_path / "out"
    assert json.loads((out / "depth.json").read_text())["blocks"] == {LIST: {"of": 4, "kept": kept}}
    assert json.loads((out / "config.json").read_text())["num_layers"] == 2
    manifest = (out / "compress.json").read_text()
    assert '"decisions"' not in manifest and '"choices"' in manifest
    checked = subprocess.run(
        [sys.executable, "-m", "compress", "verify", str(out)], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr

    recipe["stages"][1]["distill"]["steps"] = 5
    recipe["export"]["path"] = str(tmp_path / "longer")
    longer = compress.run(recipe, work_dir=tmp_path / "work")
    assert [stage["resumed"] for stage in longer["stages"]] == [True, False, False]
    assert longer["stages"][0]["details"]["decisions"] == search["details"]["decisions"]


def test_the_shipped_recipe_halves_the_built_in_model():
    plan = compress.plan("dit_tinyfusion")
    before, after = (plan["stages"][0][when]["macs"] for when in ("before", "after"))
    assert after / before == pytest.approx(0.502, abs=0.002)
    assert [stage.method for stage in load_recipe("dit_tinyfusion").recipe.stages] == [
        "tinyfusion",
        "distill",
    ]
    assert not any("fine-tuning required" in note for stage in plan["stages"] for note in stage["notes"])
