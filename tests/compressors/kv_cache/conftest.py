"""Tiny language models with sequences of random tokens, for the stage that compresses caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compress.calibration.text import TextCalibration
from compress.compressors.base import Workspace
from compress.compressors.kv_cache.cskv import Cskv
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.kv_cache import CskvSettings
from compress.recipes.schema import ModelRef
from safetensors.torch import save_file


def settings(**keys):
    """Return settings as a recipe gives them."""
    return CskvSettings.model_validate_json(json.dumps(keys), strict=True)


@pytest.fixture
def opened(make_llm):
    """Return `opened(class_name, **config)` -> a fresh OpenModel of a tiny checkpoint, 2 KV heads."""

    def make(class_name="LlamaForCausalLM", **config):
        return open_model(ModelRef(id=str(make_llm(class_name, **config))), progress=SilentProgress())

    return make


@pytest.fixture
def calibration(tmp_path):
    """Return `calibration(model, samples=6, length=20)` -> recorded sequences of random tokens."""

    def make(model, samples=6, length=20, batch_size=4):
        generator = torch.Generator().manual_seed(11)
        ids = torch.randint(model.config["vocab_size"], (samples, length), generator=generator)
        file = tmp_path / f"tokens-{samples}-{length}.safetensors"
        save_file({"input_ids": ids}, file)
        return TextCalibration(3, "tokens", file, samples, batch_size)

    return make


@pytest.fixture
def run(calibration, tmp_path):
    """Return `run(model, folder=None, **keys)` -> details of the stage, applied in place."""

    def apply(model, folder=None, recorded=None, **keys):
        workspace = Workspace(Path(folder or tmp_path / "stage"), tmp_path / "shared")
        recorded = recorded or calibration(model)
        return Cskv().apply(model, settings(**keys), recorded, workspace, SilentProgress())["kv_cache"]

    return apply
