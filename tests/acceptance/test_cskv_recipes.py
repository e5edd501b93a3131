"""The shipped recipes of a compressed cache: one plans from a config alone, the other runs offline."""

from __future__ import annotations

import json
import subprocess
import sys

import compress
import pytest
from compress.errors import PlanError
from compress.recipes.loader import load_recipe

MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None,
    "tie_word_embeddings": False, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
LONGCHAT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "rope_scaling": {"type": "linear", "factor": 8.0}, "torch_dtype": "bfloat16",
}  # fmt: skip
NAME = "mistral_7b_cskv_80"


@pytest.fixture
def planned(tmp_path):
    """Return `planned(config, *overrides)` -> the plan of the recipe for a model that is a config alone."""
    (tmp_path / "model").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("Some words. ")

    def plan(config, *overrides):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        given = [f"model={tmp_path / 'model'}", f"calibration.text={text}", *overrides]
        return compress.plan(load_recipe(NAME, overrides=given))

    return plan


def test_the_recipe_of_mistral_plans_the_published_bytes_from_the_config_alone(planned):
    document = planned(MISTRAL)
    (stage,) = document["stages"]
    assert (stage["before"]["kv_bytes_per_token"], stage["after"]["kv_bytes_per_token"]) == (131072, 25600)
    notes = " ".join(stage["notes"])
    assert "80.47 %" in notes and "1,243" in notes  # true shares; cached tokens from which it pays off
    assert 0.13e9 < document["export"]["bytes"] < 0.14e9


def test_of_a_model_without_shared_heads_as_well(planned):
    (stage,) = planned(LONGCHAT, "require={}")["stages"]
    assert (stage["before"]["kv_bytes_per_token"], stage["after"]["kv_bytes_per_token"]) == (524288, 102400)
    assert "1,989" in " ".join(stage["notes"])
    with pytest.raises(PlanError) as caught:
        planned(LONGCHAT)
    assert "require.kv_bytes_per_token: <= 25600 cannot be reached" in caught.value.message
    assert "`removed` of cskv" in caught.value.hint


def test_four_bits_are_told_with_their_scales(planned):
    """Of 80.47 %: 4 bits, and of 32 tokens of a key and of 25 channels of a value a scale and an offset."""
    (stage,) = planned(MISTRAL, "stages[0].cskv.bits=4")["stages"]
    per_layer = 8 * 25 * (0.5 + 4 / 32) + 8 * 25 * 0.5 + 8 * 4
    assert stage["after"]["kv_bytes_per_token"] == 32 * per_layer == 8224
    assert (
        round(100 * (1 - 32 * per_layer / 131072), 1) == 93.7
    )  # per cent less, as the paper's 4 bits come to


def test_hidden_numbers_beyond_the_context_are_refused(planned):
    with pytest.raises(compress.errors.RecipeError) as caught:
        planned(MISTRAL, "evaluate.decoding.passkey.lengths=[4096, 32760]")
    assert "evaluate.decoding.passkey.lengths[1]" in str(caught.value)
    assert "lower it to 32752" in caught.value.hint


def test_the_text_is_the_users(monkeypatch):
    assert load_recipe(NAME).recipe.calibration.text.name == "calibration.txt"
    monkeypatch.setenv("CSKV_TEXT", "mine.jsonl")
    assert load_recipe(NAME).recipe.calibration.text.name == "mine.jsonl"


@pytest.mark.slow
def test_the_offline_recipe_runs_within_its_gates(tmp_path):
    program = "import sys; from compress.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "llm_cskv", "--quiet"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "out" / "llm-cskv"
    report = json.loads((out / "report.json").read_text())
    assert all(row["passed"] for row in report["gates"]) and report["export"]["verified"]
    metrics, text = report["evaluation"]["metrics"], report["evaluation"]["text"]
    assert metrics["perplexity_increase"] == 0.0 and "nothing of a compressed cache" in text["note"]
    assert 0.0 < metrics["decode_perplexity_increase"] < 0.03
    card = (out / "README.md").read_text()
    assert "## The compressed key-value cache" in card and "](decoding.png)" in card
    assert (out / "kv_singular_values.png").is_file()
