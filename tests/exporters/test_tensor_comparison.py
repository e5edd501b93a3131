"""What was cut on disk, held against its source: equal tensors pass, and everything else is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compress.errors import SourceError
from compress.exporters.experts_on_disk import cut_on_disk
from compress.exporters.tensor_comparison import check_copies, compare
from compress.exporters.tensor_process import compare_in_fresh_process
from compress.exporters.tensors_seen import compared_tensors
from compress.models.checkpoint import locate
from compress.models.open import read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.moe_config import moe_shape
from safetensors.torch import load_file, save_file

from ..tiny_moe import CLASSES, make_moe

CHOICE = {6: (0, 2, 5), 8: (1, 2, 5, 7)}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def _cut(source, folder, **changes):
    """Cut on disk; return what stays in every layer."""
    shape = moe_shape(read_spec(ModelRef(id=str(source))).config)
    kept = dict.fromkeys(shape.sparse, CHOICE[shape.routing.experts])
    folder.mkdir()
    dtype = changes.pop("dtype", None)
    cut_on_disk(ModelRef(id=str(source), dtype=dtype), kept, folder, progress=SilentProgress(), **changes)
    return kept


@pytest.fixture
def mixtral(tmp_path):
    """A folder, what was cut from it, and what stays."""
    source = make_moe(tmp_path / "m", "MixtralForCausalLM", dtype="bfloat16")
    return source, tmp_path / "cut", _cut(source, tmp_path / "cut")


def _differences(mixtral, dtype="BF16", **changes):
    source, cut, kept = mixtral
    return compare(
        source, cut, changes.get("kept", kept), active=changes.get("active"), dtype=dtype
    ).differences


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("hub_names", [True, False], ids=["hub", "fused"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_what_was_cut_is_what_the_source_holds(class_name, hub_names, tmp_path):
    source = make_moe(tmp_path / "m", class_name, dtype="bfloat16", hub_names=hub_names)
    kept = _cut(source, tmp_path / "cut", max_shard_size=20_000)
    told = []
    found = compare(
        source, tmp_path / "cut", kept, active=None, dtype="BF16",
        advance=lambda size, name: told.append((size, name)),
    )  # fmt: skip
    stored = [load_file(path) for path in (tmp_path / "cut").glob("*.safetensors")]
    assert found.differences == () and found.tensors == sum(map(len, stored)) == len(told)
    assert found.bytes == sum(size for size, _ in told) > 10_000
    moved = {layer: (*experts[:-1], experts[-1] - 1) for layer, experts in kept.items()}
    others = compare(source, tmp_path / "cut", moved, active=None, dtype="BF16").differences
    # Of every layer the last expert and the rows of the router are others, and nothing else is.
    assert len(others) >= 2 * len(kept) and all(".mlp." in text for text in others)


def test_a_bit_that_is_another_is_named(mixtral):
    assert _differences(mixtral) == ()

    def flip(tensors):
        tensors[EXPERT].view(torch.int16)[-1, -1] ^= 1

    _change(mixtral[1], flip)
    assert _differences(mixtral) == (
        "tensor 'model.layers.1.mlp.experts.2.up_proj.weight' differs from the source's",
    )


def test_rows_of_a_router_in_another_order_are_named(mixtral):
    name = "model.layers.0.block_sparse_moe.gate.weight"
    _change(mixtral[1], lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    assert _differences(mixtral) == ("tensor 'model.layers.0.mlp.gate.weight' differs from the source's",)


def test_another_type_is_named_and_a_wanted_one_is_rounded_as_torch_rounds(mixtral, tmp_path):
    stored = len(load_file(mixtral[1] / "model.safetensors"))
    assert sum("stored as BF16, not as F32" in text for text in _differences(mixtral, "F32")) == stored
    source = make_moe(
        tmp_path / "wide", "DeepseekV3ForCausalLM", dtype="bfloat16"
    )  # corrections are in float32
    _change(source, lambda tensors: tensors.update({k: v.float() * 1.0001 for k, v in tensors.items()}))
    kept = _cut(source, tmp_path / "narrow", dtype="float16")
    whole = source, tmp_path / "narrow", kept
    assert _differences(whole, "F16") == ()
    name = "lm_head.weight"
    _change(tmp_path / "narrow", lambda t: t.update({name: torch.nextafter(t[name], t[name] + 1)}))
    assert _differences(whole, "F16") == (f"tensor {name!r} differs from the source's",)


def test_weights_left_in_float32_are_not_taken_for_rounded_ones(tmp_path):
    source = make_moe(tmp_path / "m", "MixtralForCausalLM")
    whole = source, tmp_path / "cut", _cut(source, tmp_path / "cut")
    assert _differences(whole, "F32") == ()
    names = sorted(load_file(tmp_path / "cut" / "model.safetensors"))
    said = _differences(whole, "F16")
    assert len(said) == len(names) and all("is stored as F32, not as F16" in text for text in said)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 5.0), ("hidden_act", "gelu"), ("num_experts_per_tok", 1)]
)
def test_a_config_that_says_something_else_is_named(mixtral, key, value):
    path = mixtral[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert _differences(mixtral) == (f"config.json says otherwise of {key}",)


def test_a_missing_tensor_and_one_too_many_are_errors(mixtral):
    _change(mixtral[1], lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(SourceError, match=r"'model\.norm\.weight' is missing"):
        _differences(mixtral)
    _change(
        mixtral[1],
        lambda t: t.update({"model.norm.weight": t["lm_head.weight"][0].clone(), "more": torch.ones(1)}),
    )
    with pytest.raises(SourceError, match="'more' is unknown"):
        _differences(mixtral)


def test_copies_that_differ_are_refused(tmp_path):
    source = make_moe(tmp_path / "m", "MixtralForCausalLM", tie_word_embeddings=True)
    check_copies(locate(ModelRef(id=str(source))))
    embeddings = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    _change(source, lambda tensors: tensors.update({"lm_head.weight": embeddings.clone()}))
    check_copies(locate(ModelRef(id=str(source))))
    _change(source, lambda tensors: tensors.update({"lm_head.weight": embeddings + 1}))
    with pytest.raises(SourceError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"):
        check_copies(locate(ModelRef(id=str(source))))


class _Bars(SilentProgress):
    def __init__(self):
        self.total, self.done = None, 0

    def start(self, label, total):
        self.total = total

    def advance(self, units=1, detail=""):
        self.done += units


def _fresh(mixtral, progress=None, dtype="BF16"):
    source, cut, kept = mixtral
    size = sum(tensor.nbytes for tensor in load_file(cut / "model.safetensors").values())
    return compare_in_fresh_process(
        source, cut, kept, active=None, dtype=dtype, size_bytes=size, progress=progress or SilentProgress()
    )


def test_a_fresh_process_says_the_same(mixtral):
    bars = _Bars()
    failure, note = _fresh(mixtral, bars)
    assert failure is None and compared_tensors({"notes": [note]}) and bars.done == bars.total > 0
    assert not compared_tensors({"notes": ["something else"]}) and not compared_tensors({})
    _change(mixtral[1], lambda tensors: tensors[EXPERT].zero_())
    failure, note = _fresh(mixtral)
    assert failure.startswith(
        "compared with the source in a fresh process: tensor 'model.layers.1.mlp.experts.2.up"
    )
    shutil.rmtree(mixtral[1])
    failure, _ = _fresh((mixtral[0], mixtral[1].parent / "m", mixtral[2]))
    assert "config.json says otherwise of num_local_experts" in failure


def test_a_process_that_ends_early_is_told_of(mixtral, monkeypatch):
    from compress.exporters import tensor_process

    monkeypatch.setattr(tensor_process, "_WORKER", "compress.exporters.no_such_module")
    failure, note = _fresh(mixtral)
    assert "could not be compared" in failure and "no_such_module" in failure and note == ""
