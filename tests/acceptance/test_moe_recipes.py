"""The shipped recipes of expert pruning: one plans from a config alone, the other runs offline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import compress
import pytest
from compress.recipes.loader import load_recipe

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_the_recipe_of_mixtral_plans_within_its_gates_from_the_config_alone(tmp_path):
    folder = tmp_path / "mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    recipe = load_recipe("mixtral_8x7b_eep_4", overrides=[f"model={folder}", "require={}"])
    stage = compress.plan(recipe)["stages"][0]
    before, after = stage["before"], stage["after"]
    assert after["parameters"] == 24_153_690_112 and round(before["parameters"] / 1e9, 3) == 46.703
    gates = load_recipe("mixtral_8x7b_eep_4").recipe.require
    assert gates["parameters"].holds(after["parameters"])
    assert gates["size_ratio"].holds(after["bytes"] / before["bytes"])


def test_its_items_are_the_users(monkeypatch):
    (stage,) = load_recipe("mixtral_8x7b_eep_4").recipe.stages
    assert stage.settings.fitness.data.name == "items.jsonl"
    monkeypatch.setenv("EEP_ITEMS", "mine.jsonl")
    (stage,) = load_recipe("mixtral_8x7b_eep_4").recipe.stages
    assert stage.settings.fitness.data.name == "mine.jsonl" and stage.settings.groups == 4


def test_the_offline_recipe_is_the_setting_of_the_reference():
    (stage,) = load_recipe("moe_eep").recipe.stages
    settings = stage.settings
    assert (settings.keep_experts, settings.groups, settings.router) == (4, "per_layer", "onehot")
    assert (settings.init_random, settings.prune_evals, settings.total_evals) == (31, 100, 400)
    assert (settings.fitness.by, settings.fitness.task) == ("tokens", "sort")
    assert (settings.splits.train, settings.splits.dev, settings.splits.test) == (128, None, 512)


@pytest.mark.slow
def test_the_offline_recipe_runs_within_its_gates_and_opens_as_stock(tmp_path):
    from transformers import AutoModelForCausalLM

    program = "import sys; from compress.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "moe_eep", "--quiet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "out" / "moe-eep"
    report = json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["stages"][0]["details"]["scores"]}
    chosen, found = rows.get("eep: experts chosen", rows["eep"]), rows["eep"]
    assert rows["original"]["accuracy"] >= 0.99
    assert chosen["accuracy"] >= rows["random"]["accuracy"] + 2 * rows["random"]["deviation"]
    assert found["train"] >= chosen["train"]
    rules = ("frequency", "soft_activation", "naee")
    assert chosen["train"] >= max(rows[rule]["train"] for rule in rules)
    assert rows["eep"]["accuracy"] == pytest.approx(report["evaluation"]["metrics"]["answers"], abs=1e-5)
    plain = tmp_path / "plain"  # stock code knows no file of ours
    plain.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(out / name, plain / name)
    model, told = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_local_experts == 4
