"""Pruning and recovery of a denoiser as a user meets them: a run, what it writes, and a second run."""

import json
import subprocess
import sys

import compress
import pytest
import torch
from safetensors.torch import load_file

from ..small_dits import Told, equal_embedders, recipe_for


@pytest.fixture
def recipe(make_tiny, tmp_path):
    """A recipe that removes channels of a tiny DiT and trains it on its own samples."""
    folder = equal_embedders(make_tiny(num_layers=3, name="three"))
    stages = [
        {"isomorphic": {"importance": "magnitude", "ratios": {"ff": 0.25}}},
        {"distill": {"steps": 6, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 2}},
    ]
    return recipe_for(folder, stages, tmp_path / "out")


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.slow
def test_a_denoiser_is_pruned_and_trained(recipe, tmp_path):
    first = Told()
    document = compress.run(recipe, work_dir=tmp_path / "work", progress=first)
    assert first.labels.count("drawing training samples") == 1
    details = document["stages"][1]["details"]
    assert details["data"] == 16 and details["steps"] == 6
    assert details["matched"] == {"transformer_blocks": [[0, 0], [1, 1], [2, 2]]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 steps on 16 latents; training loss" in card and "no stage trains the model" not in card
    checked = subprocess.run(
        [sys.executable, "-m", "compress", "verify", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recipe.yaml is the recipe of the report" in checked.stdout

    # Another number of steps: neither the samples nor the pruning are made again.
    recipe["stages"][1]["distill"]["steps"] = 7
    recipe["export"]["path"] = str(tmp_path / "longer")
    again = Told()
    longer = compress.run(recipe, work_dir=tmp_path / "work", progress=again)
    assert [stage["resumed"] for stage in longer["stages"]] == [True, False]
    assert "drawing training samples" not in again.labels
    # Other data: the training is made again, the pruning is not.
    recipe["calibration"]["data"]["generate"] = 17
    recipe["export"]["path"] = str(tmp_path / "more")
    more = compress.run(recipe, work_dir=tmp_path / "work", progress=(last := Told()))
    assert [stage["resumed"] for stage in more["stages"]] == [True, False]
    assert "drawing training samples" in last.labels and more["stages"][1]["details"]["data"] == 17


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    compress.run(recipe, work_dir=tmp_path / "one")
    recipe["export"]["path"] = str(tmp_path / "again")
    compress.run(recipe, work_dir=tmp_path / "two")
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_plan_says_what_training_takes(recipe):
    plan = compress.plan(recipe)
    notes = plan["stages"][1]["notes"]
    assert any(note.startswith("the original answers beside it") for note in notes)
    assert any(note.startswith("training: 6 steps of 4") for note in notes)
    assert not any("fine-tuning required" in note for stage in plan["stages"] for note in stage["notes"])
    json.dumps(plan)
