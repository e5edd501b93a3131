"""torchao's tensors: exact where it can be, refused where it cannot, and loaded by stock diffusers."""

from __future__ import annotations

import json
from dataclasses import replace

import compress
import pytest
import torch
from compress.errors import PlanError
from compress.exporters.formats import predict_bytes, write
from compress.exporters.torchao_format import in_memory
from compress.models.base import TensorSpec

BLOCK = "transformer_blocks.0"


@pytest.fixture
def exported(make_tiny, open_quantized, schemes, tmp_path):
    def build(fields=None, dtype="bfloat16", **options):
        model = open_quantized(make_tiny(dtype=dtype), fields or schemes["torchao"])
        out = tmp_path / "out"
        out.mkdir()
        return model, out, write(model, out, "torchao", **options)

    return build


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 60_000])
def test_stock_loading_is_bit_equal_to_the_converted_model(exported, outputs_of, dtype, max_shard_size):
    import diffusers

    model, out, info = exported(dtype=dtype, max_shard_size=max_shard_size)
    expected = outputs_of(in_memory(model))
    stock, loading = diffusers.DiTTransformer2DModel.from_pretrained(
        out, torch_dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not any(loading.values())
    assert torch.equal(outputs_of(stock), expected)
    assert torch.equal(outputs_of(compress.load(out)), expected)
    if max_shard_size == 60_000:
        assert sum(name.endswith(".safetensors") for name in info.files) > 2


def test_the_model_in_memory_is_not_changed(exported, outputs_of):
    model, _, _ = exported()
    before = outputs_of(model.module)
    in_memory(model)
    assert torch.equal(outputs_of(model.module), before)


def test_grids_are_exact_below_eight_bits_and_symmetric(exported):
    model, _, _ = exported()
    converted = in_memory(model)
    for name in (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", f"{BLOCK}.attn1.to_v"):
        weight = converted.get_submodule(name).weight
        exact = model.module.get_submodule(name).dequantized_weight()
        assert weight.zero_point is None
        torch.testing.assert_close(weight.qdata.float() * weight.scale, exact, rtol=1e-6, atol=0)


def test_an_asymmetric_eight_bit_grid_is_rounded_to_a_symmetric_one(exported):
    model, _, info = exported()
    name = f"{BLOCK}.ff.net.0.proj"
    weight = in_memory(model).get_submodule(name).weight
    exact = model.module.get_submodule(name).dequantized_weight()
    assert weight.zero_point is None
    assert bool(((weight.qdata * weight.scale - exact).abs() <= weight.scale / 2 * 1.0001).all())
    assert any("rounded to a symmetric one" in note for note in info.notes)
    assert any("int8 containers" in note for note in info.notes)


def test_weight_only_layers_have_no_activation_grid(exported):
    model, _, _ = exported()
    converted = in_memory(model)
    assert converted.get_submodule(f"{BLOCK}.norm1.linear").weight.act_quant_kwargs is None
    assert converted.get_submodule(f"{BLOCK}.attn1.to_q").weight.act_quant_kwargs is not None
    assert converted.get_submodule(f"{BLOCK}.ff.net.2").weight.act_pre_scale.shape == (256,)


def test_the_config_names_the_layers(exported):
    _, out, _ = exported()
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "torchao"
    from diffusers import TorchAoConfig

    config = TorchAoConfig.from_dict({k: v for k, v in section.items() if k != "quant_method"})
    patterns = list(config.quant_type.fqn_to_config)
    assert len(patterns) == 3
    assert all(pattern.startswith("re:transformer_blocks") for pattern in patterns)


@pytest.mark.parametrize(
    ("fields", "words", "hint"),
    [
        ({"rotation": {"block": 64}}, "a rotation", "rotation: none"),
        ({"group_size": 32}, "weight groups", "group_size: null"),
        ({"low_rank": 2}, "a low-rank branch", "low_rank: 0"),
        ({"activation": {"bits": 4}}, "not 8-bit", "activation_bits: 8"),
    ],
)
def test_what_it_cannot_express(make_tiny, open_quantized, tmp_path, fields, words, hint):
    model = open_quantized(make_tiny(), {"*.attn1.to_q": {"activation": {"bits": 8}, **fields}})
    with pytest.raises(PlanError, match=words) as caught:
        write(model, tmp_path, "torchao")
    assert f"{BLOCK}.attn1.to_q" in caught.value.message
    assert hint in caught.value.hint
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("format", ["torchao", "sdnq", "dequantized"])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 60_000])
def test_predicted_bytes_are_the_written_ones(
    make_tiny, open_quantized, tmp_path, schemes, format, max_shard_size
):
    fields = {"*.attn1.*": {"bits": 4, "symmetric": False, "activation": {"bits": 8}}, "*.ff.*": {"bits": 8}}
    chosen = schemes["torchao"] if format == "torchao" else fields
    model = open_quantized(make_tiny(dtype="bfloat16"), chosen)
    tensors = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in model.module.state_dict().items()}
    spec = replace(model.spec, tensors=tensors, quantization=model.quantization)
    info = write(model, tmp_path, format, max_shard_size=max_shard_size)
    assert predict_bytes(spec, format, max_shard_size=max_shard_size) == info.bytes


def test_an_unknown_format(make_tiny, open_quantized, tmp_path):
    model = open_quantized(make_tiny(), {})
    with pytest.raises(PlanError, match="'gguf' is not one of compress, torchao"):
        write(model, tmp_path, "gguf")
