"""An exported mixture of experts: verified in a fresh process, and described expert by expert."""

from __future__ import annotations

import pytest
import torch
from compress.exporters.experts_on_disk import cut_on_disk
from compress.exporters.formats import write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import inspect
from compress.models.experts import keep_experts_of
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.moe_config import moe_shape

from ..tiny_moe import make_moe


def _exported(tmp_path, class_name, mixing=None):
    model = open_model(ModelRef(id=str(make_moe(tmp_path / "m", class_name))), progress=SilentProgress())
    keep_experts_of(model, dict.fromkeys(moe_shape(model.config).sparse, (0, 2, 5)), mixing=mixing)
    (tmp_path / "out").mkdir()
    write(model, tmp_path / "out", "compress")
    return model, tmp_path / "out"


@pytest.mark.slow
def test_a_fresh_process_gives_equal_bits_and_sees_another_expert(tmp_path):
    model, folder = _exported(tmp_path, "MixtralForCausalLM", {1: torch.full((3, 6), 1 / 6)})
    verification = verify_export(model, folder, seed=3, progress=SilentProgress())
    assert verification.verified and verification.failure is None
    assert verification.max_abs_error == 0.0 and set(verification.ways) == {"stock", "compress"}
    other = tmp_path / "other"
    other.mkdir()
    kept = {0: (0, 2, 5), 1: (0, 2, 4), 2: (0, 2, 5)}
    cut_on_disk(ModelRef(id=str(tmp_path / "m")), kept, other, progress=SilentProgress())
    verification = verify_export(model, other, seed=3, progress=SilentProgress())
    assert not verification.verified and verification.max_abs_error > 0.0


def test_inspect_lists_the_experts_that_are_left(tmp_path):
    model, folder = _exported(tmp_path, "PhimoeForCausalLM")
    found = inspect(folder)
    assert found["class"] == "PhimoeForCausalLM" and found["format"] == "dense"
    assert found["parameters"] == model.size().parameters and found["tensor_bytes"] == model.size().bytes
    layers = {row["name"]: row["shape"] for row in found["layers"]}
    assert layers["model.layers.1.mlp.experts.2.down_proj"] == [32, 24]
    assert layers["model.layers.1.mlp.router"] == [3, 32]
    assert "model.layers.1.mlp.experts.3.down_proj" not in layers
