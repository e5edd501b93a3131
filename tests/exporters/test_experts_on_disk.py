"""Checkpoints cut on disk: the bytes of the way through memory, without the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod

import pytest
import torch
import transformers
from compress.errors import PlanError, SourceError
from compress.exporters import compress_format, formats
from compress.exporters.experts_on_disk import cut_on_disk
from compress.exporters.writer import StoredTensor, write_tensors
from compress.models.experts import keep_experts_of
from compress.models.open import open_model, read_spec
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.moe_config import moe_shape
from safetensors.torch import load_file, save_file

from ..peaks import PEAK
from ..tiny_moe import CLASSES, make_moe, moe_config

CHOICE = {6: (0, 2, 5), 8: (1, 2, 5, 7)}
MIB = 2**20


def _cut(source, folder, kept, **changes):
    folder.mkdir()
    return cut_on_disk(ModelRef(id=str(source)), kept, folder, progress=SilentProgress(), **changes)


def _kept(folder):
    shape = moe_shape(read_spec(ModelRef(id=str(folder))).config)
    return dict.fromkeys(shape.sparse, CHOICE[shape.routing.experts])


@pytest.mark.parametrize("hub_names", [True, False], ids=["hub", "fused"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_folder_is_that_of_the_way_through_memory(class_name, hub_names, tmp_path):
    source = make_moe(tmp_path / "m", class_name, dtype="bfloat16", hub_names=hub_names)
    kept = _kept(source)
    active = None if class_name == "PhimoeForCausalLM" else 1
    info = _cut(source, tmp_path / "cut", kept, active=active, max_shard_size=20_000)
    model = open_model(ModelRef(id=str(source)), progress=SilentProgress())
    keep_experts_of(model, kept, active=active)
    (tmp_path / "out").mkdir()
    usual = formats.write(model, tmp_path / "out", "compress", max_shard_size=20_000)
    assert len([name for name in usual.files if name.endswith(".safetensors")]) > 2
    for name in usual.files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert set(info.files) == {*usual.files, "generation_config.json"}
    assert (info.bytes, info.tensor_bytes, info.loads_with) == (
        usual.bytes, usual.tensor_bytes, usual.loads_with
    )  # fmt: skip
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(report.values()), report


def test_types_are_those_of_the_way_through_memory(tmp_path):
    source = make_moe(tmp_path / "m", "DeepseekV3ForCausalLM", dtype="bfloat16")
    tensors = load_file(source / "model.safetensors")
    wide = "model.layers.1.mlp.experts.2.up_proj.weight"
    correction = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors |= {wide: tensors[wide].float() * 1.0001, correction: tensors[correction].float() * 1.0001}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    kept = _kept(source)
    _cut(source, tmp_path / "cut", kept)
    after = load_file(tmp_path / "cut" / "model.safetensors")
    assert torch.equal(after[correction], tensors[correction][list(CHOICE[8])])
    place = wide.replace("experts.2", f"experts.{CHOICE[8].index(2)}")
    assert torch.equal(after[place], tensors[wide].bfloat16())


def _failing(source, tmp_path, kept, error, message):
    folder = tmp_path / "cut"
    with pytest.raises(error, match=message):
        _cut(source, folder, kept)
    return folder


def test_a_wrong_choice_is_refused_before_a_weight_is_read(tmp_path):
    source = make_moe(tmp_path / "m", "MixtralForCausalLM")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = float("nan")  # which reading would find
    save_file(tensors, source / "model.safetensors")
    folder = _failing(source, tmp_path, {0: (0, 1)}, PlanError, "nothing is said of the experts of layer 1")
    assert not list(folder.iterdir())


def test_what_is_not_finite_is_named_and_what_goes_is_not_read(tmp_path):
    source = make_moe(tmp_path / "m", "MixtralForCausalLM")
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name.format(3)].fill_(float("inf"))
    save_file(tensors, source / "model.safetensors")
    _cut(source, tmp_path / "without", dict.fromkeys(range(3), (0, 2, 5)))
    _failing(
        source, tmp_path, dict.fromkeys(range(3), (0, 3)), SourceError, r"experts\.3\.down_proj.*NaN or Inf"
    )


def test_a_dense_model_is_refused(make_llm, tmp_path):
    _failing(make_llm("LlamaForCausalLM"), tmp_path, {0: (0,)}, PlanError, "is not a mixture of experts")


def _large(folder, experts=8, layers=3, width=768, inner=2688):
    """Write about 300 MB of random bfloat16 experts in shards of 64 MB, without holding more than one."""
    config = moe_config(
        "MixtralForCausalLM", hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_local_experts=experts, num_attention_heads=8,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    spec = read_spec(ModelRef(id=str(folder)))
    generator = torch.Generator().manual_seed(0)
    tensors, _ = compress_format.predict(spec)
    block = torch.empty(width * inner, dtype=torch.bfloat16).uniform_(-1.0, 1.0, generator=generator)

    def drawn(shape):
        return block[: prod(shape)].view(shape).roll(len(shape) + shape[0])

    filled = [StoredTensor(t.name, t.dtype, t.shape, lambda shape=t.shape: drawn(shape)) for t in tensors]
    write_tensors(folder, filled, max_shard_size=64 * MIB, name="model.safetensors")
    return folder


_MEASURED = f"""{PEAK}
import sys
from compress.exporters import experts_on_disk
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
before = peak()
experts_on_disk.cut_on_disk(
    ModelRef(id=sys.argv[1]), dict.fromkeys(range(3), (0, 2, 5, 7)), __import__("pathlib").Path(sys.argv[2]),
    progress=SilentProgress(), max_shard_size=2**26)
print(before, peak())
"""


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path):
    source = _large(tmp_path / "m")
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total > 280 * MIB and len(list(source.glob("*.safetensors"))) >= 5
    (tmp_path / "cut").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "cut")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    largest = 768 * 2688 * 2
    assert peak - before < largest + 24 * MIB, f"{(peak - before) / MIB:.0f} MiB more than the imports"
    assert peak < 64 * MIB + 2**30
    kept = sum(path.stat().st_size for path in (tmp_path / "cut").glob("*.safetensors"))
    assert 0.5 < kept / total < 0.54
