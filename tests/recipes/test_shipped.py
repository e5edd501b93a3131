"""Every shipped recipe loads, carries its header and modeline; the committed JSON Schema is fresh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe
from compress.recipes.schema import Recipe, json_schema, method_names
from compress.recipes.shipped import FOLDER, resolve, shipped

NAMES = [item.name for item in shipped()]


def test_the_shipped_ones_are_there():
    assert {"dit_w4a8", "dit_w4a8_faithful", "dit_w8a8", "dit_xl_w4a8"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it must load from anywhere
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith("# Needs ")
    assert lines[2] == "# yaml-language-server: $schema=schema.json"
    recipe = load_recipe(name).recipe
    assert recipe.calibration.prompts is None or recipe.calibration.prompts.is_file()
    assert str(recipe.export[0].path) == f"out/{name.replace('_', '-')}"


def test_the_faithful_recipe_takes_nothing_from_beyond_the_paper():
    (stage,) = load_recipe("dit_w4a8_faithful").recipe.stages
    settings = stage.settings.model_dump()
    assert isinstance(settings["act_exponent"], float)
    assert (settings["clip"], settings["rounding"], settings["rotation"]) == ("minmax", "nearest", "hadamard")
    assert (settings["group_size"], settings["low_rank"], settings["weight_symmetric"]) == (None, 0, False)


def test_the_xl_recipe_runs_one_product_per_layer():
    (stage,) = load_recipe("dit_xl_w4a8").recipe.stages
    assert stage.settings.group_size is None


def test_the_recipe_of_half_the_depth_is_the_papers():
    search, recovery = (stage.settings for stage in load_recipe("dit_xl_tinyfusion_d14").recipe.stages)
    assert (search.mode, search.lora.rank, search.lora.alpha, search.decay) == ("lora", 8, 16.0, 0.999)
    assert (search.steps, search.batch_size, search.lr, search.gate_lr) == (10_000, 128, 1e-4, 1e-3)
    assert (search.tau, search.scaling, search.clip_norm) == ((4.0, 0.1), (100.0, 100.0), 1.0)
    assert (recovery.steps, recovery.batch_size, recovery.weight_decay) == (500_000, 256, 0.0)
    assert (recovery.lr, recovery.min_lr, recovery.warmup, recovery.ema) == (2e-4, 1e-4, 0.0, 0.9999)
    assert (recovery.answers, recovery.denoising, recovery.features) == (0.9, 0.1, 0.01)
    assert (recovery.mask, recovery.sigmas, recovery.clip_norm) == ("zero", 2.0, 1.0)


def test_the_chain_begins_as_the_recipe_without_a_quantizer_does():
    """So that a work directory has its first two stages, whichever of the two runs first."""
    alone, chain = (load_recipe(name).recipe for name in ("dit_tinyfusion", "dit_prune_quantize"))
    assert alone.calibration == chain.calibration and alone.seed == chain.seed
    assert alone.stages == chain.stages[:2] and chain.stages[2].method == "vidit_q"


def test_descriptions():
    for item in shipped():
        assert len(item.does) > 20 and item.needs.startswith("Needs ")


def test_schema_is_fresh():
    committed = (FOLDER / "schema.json").read_text()
    assert committed == json.dumps(json_schema(), indent=1) + "\n", (
        "run: compress schema > recipes/schema.json"
    )


def test_schema_describes_stages_as_one_key_mappings():
    schema = json_schema()
    stage = schema["properties"]["stages"]["items"]
    assert (stage["minProperties"], stage["maxProperties"], stage["additionalProperties"]) == (1, 1, False)
    assert list(stage["properties"]) == method_names()
    for method in stage["properties"].values():
        assert method["additionalProperties"] is False and method["description"]
        for setting in method["properties"].values():
            assert setting["description"]


def test_every_key_is_described():
    def walk(node, path):
        if isinstance(node, dict):
            for name, child in node.get("properties", {}).items():
                assert "description" in child or "$ref" in child, f"{path}.{name}"
                walk(child, f"{path}.{name}")
            for key in ("anyOf", "$defs"):
                children = node.get(key, [])
                for child in children.values() if isinstance(children, dict) else children:
                    walk(child, path)

    walk(json_schema(), "recipe")


def test_schema_agrees_with_the_model():
    assert set(json_schema()["properties"]) == set(Recipe.model_fields)


def test_resolve(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("dit_w4a8") == resolve("dit_w4a8.yaml") == FOLDER / "dit_w4a8.yaml"
    own = tmp_path / "dit_w4a8.yaml"
    own.write_text("model: m\n")
    assert resolve("dit_w4a8.yaml") == Path("dit_w4a8.yaml")  # one's own file comes first
    with pytest.raises(RecipeError, match="is a folder"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["dit_w4a", "recipes/dit_w4a.yaml", "dit-w4a8-2"])
def test_an_unknown_recipe_names_near_ones(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert caught.value.message == f"{name}: no such recipe file"
    assert "did you mean 'dit_w4a8" in caught.value.hint and "compress recipes" in caught.value.hint
