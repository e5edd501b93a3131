"""sdnq's layout, written without sdnq: packing by known answers, every kind of layer, refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import sys

import compress
import pytest
import torch
from compress.errors import PlanError, SourceError, VerifyError
from compress.exporters import fresh_process
from compress.exporters.formats import write
from compress.exporters.fresh_process import verify_export
from compress.exporters.sdnq_format import check_written, pack_flat, unpack_flat
from compress.progress import SilentProgress
from compress.runtime.validate import open_folder

A8 = {"activation": {"bits": 8}}
FIELDS = {
    "*.attn1.to_q": {**A8, "bits": 8},
    "*.attn1.to_k": {**A8, "bits": 4},
    "*.attn1.to_v": {**A8, "bits": 4, "symmetric": False},
    "*.attn1.to_out.0": {**A8, "bits": 3, "symmetric": False},
    "*.ff.net.0.*": {**A8, "bits": 6},
    "*.ff.net.2": {"bits": 2, "symmetric": False, "group_size": 32},
    "*.norm1.linear": {"bits": 8, "symmetric": False},
}


@pytest.fixture
def exported(make_tiny, open_quantized, tmp_path):
    model = open_quantized(make_tiny(dtype="bfloat16"), FIELDS)
    out = tmp_path / "out"
    out.mkdir()
    return model, out, write(model, out, "sdnq")


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (4, [0, 15], [0xF0]),
        (2, [0, 1, 2, 3], [0xE4]),
        (3, [1, 2, 3, 4, 5, 6, 5, 6], [0x61, 0xAA, 0xF3]),
        (6, [1, 2, 3, 0b110110], [0xC1, 0x42, 0x83]),
    ],
)
def test_packing_by_hand(bits, values, expected):
    packed = pack_flat(torch.tensor(values), bits)
    assert packed.reshape(-1).tolist() == expected
    assert unpack_flat(packed, bits).tolist() == values


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_packing_is_undone(bits):
    values = torch.randint(0, 2**bits, (24, 40), generator=torch.Generator().manual_seed(0))
    packed = pack_flat(values, bits)
    assert packed.numel() * 8 == values.numel() * bits
    assert torch.equal(unpack_flat(packed, bits), values.reshape(-1).to(torch.int16))


def test_what_is_stored(exported):
    model, out, _ = exported
    stored = open_folder(out)
    block = "transformer_blocks.0"
    shapes = {
        f"{block}.attn1.to_q.weight": ("I8", (64, 64)),
        f"{block}.attn1.to_q.scale": ("F32", (1, 64)),
        f"{block}.attn1.to_k.weight": ("U8", (2048,)),
        f"{block}.attn1.to_k.scale": ("F32", (64, 1)),
        f"{block}.attn1.to_v.zero_point": ("F32", (64, 1)),
        f"{block}.attn1.to_out.0.weight": ("U8", (512, 3)),
        f"{block}.ff.net.0.proj.weight": ("U8", (4096, 3)),
        f"{block}.ff.net.2.scale": ("F32", (64, 8, 1)),
        f"{block}.norm1.linear.weight": ("U8", (384, 64)),
    }
    for name, (dtype, shape) in shapes.items():
        assert (stored.tensors[name].dtype, stored.tensors[name].shape) == (dtype, shape), name
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["modules_dtype_dict"]["uint3"] == [
        f"transformer_blocks.{i}.attn1.to_out.0.weight" for i in range(2)
    ]
    assert section["modules_quant_config"][f"{block}.ff.net.2.weight"] == {"group_size": 32}
    assert f"{block}.norm1.linear.weight" in section["modules_to_not_use_matmul"]
    assert "proj_out_1.weight" in section["modules_to_not_convert"]
    assert "sdnq" not in sys.modules


def test_it_decodes_to_the_model(exported):
    model, out, _ = exported
    check_written(model, out)
    layer = model.module.get_submodule("transformer_blocks.1.ff.net.0.proj")
    layer.qweight[0, 0] ^= 1
    with pytest.raises(VerifyError, match=r"transformer_blocks.1.ff.net.0.proj does not decode"):
        check_written(model, out)


def test_without_sdnq_nothing_is_called_verified(exported):
    if importlib.util.find_spec("sdnq") is not None:
        pytest.skip("sdnq is installed")
    model, out, _ = exported
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert not verification.executed
    assert verification.failure is None
    assert verification.max_abs_error is None
    assert verification.loads_with == []
    assert verification.notes == (
        "written and decoded back to the model's integers; not executed, because sdnq is not installed",
    )


def test_other_integers_are_a_failure(exported):
    model, out, _ = exported
    model.module.get_submodule("transformer_blocks.1.ff.net.0.proj").qweight[0, 0] ^= 1
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert "does not decode" in verification.failure


@pytest.mark.parametrize(("scale", "verified"), [(1.01, True), (3.0, False)])
def test_outputs_of_sdnq_are_compared_in_decibels(exported, outputs_of, monkeypatch, scale, verified):
    model, out, _ = exported
    answer = fresh_process.Answer({"stock": outputs_of(model.module) * scale}, {}, [])
    monkeypatch.setattr(fresh_process, "ask_fresh_process", lambda request, inputs: answer)
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert verification.executed
    assert verification.verified is verified
    assert verification.max_abs_error > 0
    assert verification.runtime_sqnr_db == pytest.approx(-20 * math.log10(scale - 1), abs=0.5)
    assert (verification.failure is None) == verified


def test_an_installed_sdnq_is_used(exported, monkeypatch, tmp_path):
    """A package that cannot be imported is an error of its way, not a missing one."""
    model, out, _ = exported
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "sdnq.py").write_text("raise RuntimeError('this sdnq is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    verification = verify_export(model, out, seed=0, progress=SilentProgress())
    assert not verification.verified
    assert "'stock' way" in verification.failure
    assert "this sdnq is broken" in verification.failure


def test_loading_without_sdnq_says_what_is_missing(exported):
    if importlib.util.find_spec("sdnq") is not None:
        pytest.skip("sdnq is installed")
    with pytest.raises(SourceError, match="sdnq format, which another package loads"):
        compress.load(exported[1])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input_scale": True}, "channel scale"),
        ({"rotation": {"block": 64}}, "rotation"),
        ({"low_rank": 2}, "low-rank"),
        ({"activation": {"bits": 4}}, "activations"),
    ],
)
def test_what_it_cannot_express(make_tiny, open_quantized, tmp_path, fields, words):
    model = open_quantized(make_tiny(), {"*.attn1.to_q": {**A8, **fields}})
    with pytest.raises(PlanError, match=words):
        write(model, tmp_path, "sdnq")
    assert not list(tmp_path.glob("*.safetensors"))
