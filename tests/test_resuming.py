"""The model of a finished stage takes the place of the one that was opened, its compressed cache included."""

from __future__ import annotations

import pytest
import torch
from compress.exporters.formats import write
from compress.models.experts import keep_experts_of
from compress.models.mapped_experts import map_routers_of
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.resuming import Reopener, resume
from compress.runtime.kv.attach import put_kv_cache

from .tiny_cache import decoded, fill_factors, save_llama, scheme_of, with_cache
from .tiny_moe import make_moe


def _kept(model, folder):
    folder.mkdir()
    write(model, folder, "compress")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"quantized": True, "bits": 2, "mode": "block", "window": 8}])
def test_a_compressed_cache_is_resumed_as_it_was_kept(tmp_path, options):
    model = with_cache(save_llama(tmp_path / "model", torch.bfloat16), **options)
    files = _kept(model, tmp_path / "stage")
    again = Reopener(ModelRef(id=str(tmp_path / "model")), "cpu", tmp_path / "stage")()
    assert (again.kv_cache, again.quantization) == (model.kv_cache, model.quantization)
    assert again.size() == model.size() and again.changed
    assert torch.equal(decoded(again.module), decoded(model.module))
    assert not any(parameter.requires_grad for parameter in again.module.parameters())
    assert _kept(again, tmp_path / "again") == files


def _averaged(model):
    keep_experts_of(model, dict.fromkeys(range(3), (0, 2, 5)), mixing={1: torch.full((3, 6), 1 / 6)})


def _mapped(model):
    rows = dict.fromkeys(range(3), torch.eye(6).roll(1, 0)[:4] + 0.05)
    map_routers_of(model, rows, rows)


@pytest.mark.parametrize("change", [_averaged, _mapped])
def test_so_it_is_where_experts_were_removed_before(tmp_path, change):
    ref = ModelRef(id=str(make_moe(tmp_path / "moe", "MixtralForCausalLM")))
    model = open_model(ref, progress=SilentProgress())
    change(model)
    model.kv_cache = scheme_of(model.config)
    put_kv_cache(model.module, model.kv_cache)
    fill_factors(model.module)
    files = _kept(model, tmp_path / "stage")
    again = open_model(ref, progress=SilentProgress())
    resume(again, tmp_path / "stage")
    assert again.kv_cache == model.kv_cache and again.size() == model.size()
    assert torch.equal(decoded(again.module), decoded(model.module))
    assert _kept(again, tmp_path / "again") == files
