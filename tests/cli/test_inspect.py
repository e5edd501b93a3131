"""What `inspect` shows of folders on a terminal of 80 columns."""

from __future__ import annotations

import re

import pytest
from compress.exporters.formats import write
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import STAGES
from compress.runtime.manifest import HistoryEntry

from .test_pruning_lines import DETAILS, TRAINED


def _entry(method, details, **settings):
    return HistoryEntry(
        method=method,
        settings=STAGES[method].model_validate(settings).model_dump(mode="json"),
        seed=3,
        input_hash="0" * 64,
        versions={"torch": "2"},
        details=details,
    )


@pytest.fixture
def pruned(make_vit, open_cut, tmp_path):
    """A cut ViT with the history of a stage that pruned and one that trained."""
    model = open_cut(make_vit(), [(3, 12, 96), (2, 16, 60)], "bfloat16")
    model.history = [
        _entry("isomorphic", DETAILS, target={"macs": 0.5}, round_to=4),
        _entry("finetune", TRAINED, epochs=4.0),
    ]
    (tmp_path / "cut").mkdir()
    write(model, tmp_path / "cut", "compress")
    return tmp_path / "cut"


@pytest.mark.parametrize("terminal", [False, True])
def test_a_pruned_folder_is_shown_by_its_widths(call, pruned, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = call("inspect", "cut", terminal=terminal)
    assert result.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "feed-forward 2 1,024 384 37.5% 128 to 256" in lines
    assert "heads 2 8 6 75.0% 2 to 4" in lines
    assert "parameters 2 M 900 k 45.0%" in lines
    assert "finetune: 400 steps on 5,000 images, training loss 2 -> 0.5 (means of" in " ".join(lines)
    assert "1. isomorphic, seed 3: round_to 4; target macs 0.5" in lines
    assert any(line.startswith("modules with sizes of their own ") for line in lines)
    assert any(line.startswith("vit.layers.1.mlp.fc1 60 x 64 ") for line in lines)
    assert "name shape bytes" in lines  # of one dtype, which the head says
    assert "activation" not in text and " - " not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_json_stays_complete(call, pruned):
    document = call("inspect", "cut", "--json").json
    assert document["history"][0]["details"]["classes"] == DETAILS["classes"]
    assert {"activation_bits", "shared_with", "decided_by"} <= set(document["layers"][0])
    assert document["cut"] > 0 and document["parameters_stored"] == document["parameters"]


def test_a_quantized_folder_keeps_the_columns_that_say_something(call, make_tiny, open_quantized, tmp_path):
    scheme = {"bits": 4, "symmetric": False, "activation": {"bits": 8}}
    model = open_quantized(make_tiny(dtype="bfloat16"), {"*.attn1.*": scheme})
    (tmp_path / "q").mkdir()
    write(model, tmp_path / "q", "compress")
    lines = [" ".join(line.split()) for line in call("inspect", "q").out.splitlines()]
    header = next(line for line in lines if line.startswith("name shape bits bytes dtype act. bits"))
    assert "decided by" in header and "first token" not in header
    row = next(line for line in lines if line.startswith("transformer_blocks.0.attn1.to_q "))
    assert row.startswith("transformer_blocks.0.attn1.to_q 64 x 64 4 ") and "*.attn1.*" in row
    assert any(line.startswith("copies that are not stored ") for line in lines)


def test_a_stage_that_is_not_known_here_shows_all_its_settings(call, make_vit, tmp_path):
    model = open_model(ModelRef(id=str(make_vit())), progress=SilentProgress())
    entry = _entry("isomorphic", {}, target={"macs": 0.5})
    model.history = [entry.model_copy(update={"method": "elsewhere", "settings": {"steps": 1, "x": None}})]
    (tmp_path / "other").mkdir()
    write(model, tmp_path / "other", "compress")
    lines = call("inspect", "other").out.splitlines()
    assert lines[-2:] == ["history", "  1. elsewhere, seed 3: steps 1"]
    assert not any("of their own" in line for line in lines)
