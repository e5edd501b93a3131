"""The default format: what is written, and that both ways of loading give the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace

import compress
import pytest
import torch
from compress.exporters.formats import predict_bytes, write
from compress.models.base import TensorSpec
from compress.runtime.validate import open_folder
from safetensors import safe_open


@pytest.fixture
def exported(make_tiny, open_quantized, schemes, tmp_path):
    """Return `exported(name, dtype)` -> (model, folder, info)."""

    def build(name="mixed", dtype="float32", class_name="DiTTransformer2DModel", **options):
        model = open_quantized(make_tiny(class_name, dtype=dtype), schemes[name])
        out = tmp_path / "out"
        out.mkdir()
        return model, out, write(model, out, "compress", **options)

    return build


def planned(model):
    """The spec that a planner would have made of this model."""
    tensors = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in model.module.state_dict().items()}
    return replace(model.spec, tensors=tensors, quantization=model.quantization)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_of_loading_are_bit_equal(exported, outputs_of, dtype):
    import diffusers

    model, out, _ = exported(dtype=dtype)
    expected = outputs_of(model.module)
    ours = compress.load(out)
    assert torch.equal(outputs_of(ours), expected)
    stock, loading = diffusers.DiTTransformer2DModel.from_pretrained(out, output_loading_info=True)
    assert torch.equal(outputs_of(stock), expected)
    assert not any(loading.values())
    state = stock.state_dict()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "class_name", ["PixArtTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"]
)
def test_other_families_reload(make_tiny, open_quantized, outputs_of, tmp_path, class_name):
    import diffusers

    fields = {"*attn*to_*": {"bits": 4, "symmetric": False, "activation": {"bits": 8}}}
    model = open_quantized(make_tiny(class_name, dtype="bfloat16"), fields)
    write(model, tmp_path, "compress")
    expected = outputs_of(model.module)
    assert torch.equal(outputs_of(compress.load(tmp_path)), expected)
    assert torch.equal(outputs_of(getattr(diffusers, class_name).from_pretrained(tmp_path)), expected)


def test_copies_are_stored_once_and_come_back(exported):
    model, out, _ = exported()
    stored = open_folder(out)
    embedder = "transformer_blocks.1.norm1.emb.timestep_embedder"
    for name in (f"{embedder}.linear_1.qweight", f"{embedder}.linear_1.scale", f"{embedder}.linear_2.weight"):
        assert stored.manifest.shared[name] == name.replace("blocks.1", "blocks.0")
        assert name not in stored.tensors
    state = compress.load(out).state_dict()
    for copy, canonical in stored.manifest.shared.items():
        assert torch.equal(state[copy], state[canonical])
        assert state[copy].data_ptr() != state[canonical].data_ptr()


def test_a_copy_that_was_changed_is_stored(make_tiny, open_quantized, schemes, tmp_path, outputs_of):
    model = open_quantized(make_tiny(), schemes["mixed"])
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    model.module.get_parameter(name).data[0] += 1
    write(model, tmp_path, "compress")
    assert name in open_folder(tmp_path).tensors
    assert torch.equal(outputs_of(compress.load(tmp_path)), outputs_of(model.module))


def test_config_and_manifest_say_the_same(exported):
    model, out, info = exported(dtype="bfloat16")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    manifest = json.loads((out / "compress.json").read_text())
    assert (section["quant_method"], section["version"], section["dtype"]) == ("compress", 1, "bfloat16")
    assert section["modules"] == manifest["quantization"]
    assert section["shared"] == manifest["shared"]
    assert [entry["method"] for entry in manifest["history"]] == ["test"]
    assert set(manifest["quantization"]) == set(model.quantization)
    assert info.files == [
        "bits.yaml",  # the layers differ in bits
        "compress.json",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ]


def test_average_bits_of_the_file_are_those_of_the_manifest(exported):
    model, out, _ = exported("w4a8")
    stored = open_folder(out)
    schemes = stored.manifest.quantization
    weights = sum(scheme.shape[0] * scheme.shape[1] for scheme in schemes.values())
    stated = sum(scheme.bits * scheme.shape[0] * scheme.shape[1] for scheme in schemes.values()) / weights
    in_file = 8 * sum(stored.tensors[f"{name}.qweight"].bytes for name in schemes) / weights
    assert in_file == stated == 4
    parts = ("qweight", "scale", "zero_point")
    grids = sum(stored.tensors[f"{name}.{part}"].bytes for name in schemes for part in parts)
    rows = sum(scheme.shape[0] for scheme in schemes.values())
    assert grids == weights // 2 + 5 * rows


@pytest.mark.parametrize("name", ["mixed", "w4a8", "none"])
@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 100_000])
def test_predicted_bytes_are_the_written_ones(exported, name, max_shard_size):
    model, out, info = exported(name, max_shard_size=max_shard_size)
    assert predict_bytes(planned(model), "compress", max_shard_size=max_shard_size) == info.bytes
    assert info.bytes == sum(path.stat().st_size for path in out.glob("diffusion_pytorch_model*"))


def test_shards_load_both_ways(exported, outputs_of):
    import diffusers

    model, out, info = exported(max_shard_size=50_000)
    assert sum(name.endswith(".safetensors") for name in info.files) > 2
    expected = outputs_of(model.module)
    assert torch.equal(outputs_of(compress.load(out)), expected)
    assert torch.equal(outputs_of(diffusers.DiTTransformer2DModel.from_pretrained(out)), expected)


def test_a_dense_model_is_a_plain_stock_folder(exported, outputs_of):
    import diffusers

    model, out, info = exported("none")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    stock, loading = diffusers.DiTTransformer2DModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(outputs_of(stock), outputs_of(model.module))
    assert torch.equal(outputs_of(compress.load(out)), outputs_of(model.module))
    assert info.loads_with[1].endswith("from_pretrained(path, torch_dtype=torch.float32)")


def test_same_model_same_bytes(make_tiny, open_quantized, schemes, tmp_path):
    texts = []
    for turn in ("first", "second"):
        model = open_quantized(make_tiny(name=turn), schemes["mixed"])
        (tmp_path / f"{turn}-out").mkdir()
        write(model, tmp_path / f"{turn}-out", "compress")
        files = sorted(path for path in (tmp_path / f"{turn}-out").rglob("*") if path.is_file())
        texts.append({path.name: path.read_bytes() for path in files})
    assert texts[0] == texts[1]


def test_tensors_are_packed_and_readable_by_the_stock_library(exported):
    model, out, _ = exported("w4a8")
    name = "transformer_blocks.0.attn1.to_q"
    with safe_open(out / "diffusion_pytorch_model.safetensors", framework="pt") as file:
        assert file.get_tensor(f"{name}.qweight").dtype == torch.uint8
        assert file.get_slice(f"{name}.qweight").get_shape() == [64, 32]
        for key in file.keys():  # noqa: SIM118
            assert torch.equal(file.get_tensor(key), model.module.state_dict()[key])


def test_layers_that_the_record_does_not_list_are_a_defect(make_tiny, open_quantized, schemes, tmp_path):
    model = open_quantized(make_tiny(), schemes["w4a8"])
    del model.quantization["transformer_blocks.0.attn1.to_q"]
    with pytest.raises(ValueError, match="not the ones that its record lists"):
        write(model, tmp_path, "compress")
