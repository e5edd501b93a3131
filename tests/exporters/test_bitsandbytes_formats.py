"""bitsandbytes: the package makes the same nf4 bytes, and transformers computes the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace

import bitsandbytes
import compress
import pytest
import torch
import transformers
from compress.errors import PlanError, SourceError
from compress.exporters.bitsandbytes_int8 import check
from compress.exporters.bitsandbytes_nf4 import nf4
from compress.exporters.formats import as_shipped, predict_bytes, predict_tensor_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import foreign_schemes, inspect
from compress.models.base import TensorSpec
from compress.progress import SilentProgress
from compress.runtime.bitsandbytes_section import NF4_VALUES
from safetensors.torch import load_file, save_file

NF4, INT8 = "bitsandbytes-nf4", "bitsandbytes-int8"
W8A8 = {"model.*": {"bits": 8, "activation": {"bits": 8}}}
KINDS = {"nf4": (NF4, {}), "int8": (INT8, {}), "int8 of a stage": (INT8, W8A8)}


@pytest.fixture
def open_tiny(make_llm, open_quantized):
    """Return `open(kind, class_name, dtype, **config)` -> (OpenModel, format); 64 channels, 192 inside."""

    def build(kind, class_name="LlamaForCausalLM", dtype="float32", **config):
        sizes = {"hidden_size": 64, "intermediate_size": 192, **config}
        format_, fields = KINDS[kind]
        return open_quantized(make_llm(class_name, dtype=dtype, **sizes), fields, dtype), format_

    return build


@pytest.fixture
def written(open_tiny, tmp_path):
    """Return `written(kind, ...)` -> (OpenModel, format, folder)."""

    def build(kind, *arguments, **config):
        (model, format_), folder = open_tiny(kind, *arguments, **config), tmp_path / "written"
        folder.mkdir()
        write(model, folder, format_)
        return model, format_, folder

    return build


def outputs(module):
    with torch.no_grad():
        return module(torch.arange(40).view(2, 20) % 60).logits


@pytest.mark.parametrize(
    ("class_name", "dtype"), [("LlamaForCausalLM", "float32"), ("Qwen2ForCausalLM", "bfloat16")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_computes_what_was_measured(written, kind, class_name, dtype):
    model, format_, folder = written(kind, class_name, dtype, tie_word_embeddings=dtype == "float32")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    shipped = as_shipped(model, format_)
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert ("Linear4bit" if format_ == NF4 else "Linear8bitLt") in kinds
    expected = outputs(shipped.module)
    assert torch.equal(outputs(loaded), expected)
    assert not torch.equal(outputs(model.module), expected)
    assert torch.equal(outputs(compress.load(folder)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_package_rounds_to_the_same_bytes(dtype):
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, :64] = 0
    found = nf4(weight)
    theirs, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(found["weight"], theirs)
    assert torch.equal(found["weight.absmax"], state.absmax)
    assert torch.equal(torch.tensor(NF4_VALUES), state.code)


def test_a_saved_model_of_the_library_has_the_same_tensors(written, tmp_path):
    model, _, folder = written("nf4", "Qwen2ForCausalLM", "bfloat16")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )  # fmt: skip
    source = str(model.source.folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, found = (load_file(place / "model.safetensors") for place in (tmp_path / "theirs", folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert ours == json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_what_is_measured_is_that_of_the_file(written, kind):
    model, format_, folder = written(kind, "Qwen2ForCausalLM")
    shipped, stored = as_shipped(model, format_), load_file(folder / "model.safetensors")
    for _ in range(2):  # the package changes its layers at the first product
        state = shipped.module.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[name], stored[name]) for name in stored)
        outputs(shipped.module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_predicts_the_bytes(open_tiny, tmp_path, kind, tied):
    model, format_ = open_tiny(kind, "Qwen2ForCausalLM", "bfloat16", tie_word_embeddings=tied)
    tensors = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.module.state_dict().items()
    }
    spec = replace(model.spec, tensors=tensors, quantization=model.quantization)
    info = write(model, tmp_path, format_)
    assert predict_bytes(spec, format_) == info.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert predict_tensor_bytes(spec, format_) == info.tensor_bytes


@pytest.mark.parametrize("kind", ["nf4", "int8 of a stage"])
def test_a_fresh_process_agrees(written, kind):
    model, format_, folder = written(kind, "Qwen3ForCausalLM", "bfloat16")
    found = verify_export(model, folder, seed=1, progress=SilentProgress())
    assert (found.verified, found.executed, found.failure) == (True, True, None), found
    assert found.ways == {"stock": 0.0, "compress": 0.0}
    assert (found.runtime_sqnr_db is None) == (kind == "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_and_schemes_say_what_is_stored(written, kind):
    model, format_, folder = written(kind, "Qwen2ForCausalLM")
    bits, found = 4 if format_ == NF4 else 8, inspect(folder)
    assert found["parameters"] == inspect(model.source.folder)["parameters"]
    assert (found["format"], found["quantized_bits"]) == ("bitsandbytes", bits)
    state = as_shipped(model, format_).module.state_dict()
    name = "model.layers.1.self_attn.q_proj"
    row = next(row for row in found["layers"] if row["name"] == name)
    stored = sum(t.numel() * t.element_size() for key, t in state.items() if key.startswith(f"{name}."))
    assert (row["bytes"], row["shape"], row["bits"]) == (stored, [64, 64], bits)
    again, shipped = foreign_schemes(folder), as_shipped(model, format_).quantization
    assert again.keys() == shipped.keys()
    assert all((again[n].bits, again[n].group_size) == (bits, shipped[n].group_size) for n in again)


def test_layers_that_not_every_machine_computes_stay_in_floating_point(open_tiny, tmp_path):
    model, _ = open_tiny("nf4", intermediate_size=80)
    info = write(model, tmp_path, NF4)
    assert set(as_shipped(model, NF4).quantization) == {
        f"model.layers.{index}.self_attn.{letter}_proj" for index in range(2) for letter in "qkvo"
    }
    assert "6 layers stay in floating point" in info.notes[-1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    small, _ = open_tiny("nf4", hidden_size=48, intermediate_size=80, name="small")
    with pytest.raises(PlanError, match="no linear layer has a multiple of 64 inputs"):
        as_shipped(small, NF4)


def test_int8_keeps_the_integers_and_scales_of_a_stage(written):
    model, _, folder = written("int8 of a stage")
    stored = load_file(folder / "model.safetensors")
    for name in model.quantization:
        layer = model.module.get_submodule(name)
        assert torch.equal(stored[f"{name}.weight"], layer.levels())
        assert torch.allclose(stored[f"{name}.SCB"] / 127, layer.scale.view(-1), rtol=1e-6)


def test_rows_of_zeros_have_no_scale(open_tiny, tmp_path):
    model, _ = open_tiny("int8")
    model.module.model.layers[0].mlp.up_proj.weight.data[5] = 0
    write(model, tmp_path, INT8)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert not stored[f"{name}.weight"][5].any()
    weight = model.module.model.layers[0].mlp.up_proj.weight
    back = stored[f"{name}.weight"].float() * stored[f"{name}.SCB"][:, None] / 127
    assert torch.all((back - weight).abs() <= stored[f"{name}.SCB"][:, None] / 253)


REFUSED = {
    "weight_bits: 8": {"bits": 4},
    "weight_symmetric: true": {"symmetric": False},
    "group_size: null": {"group_size": 16},
    "rotation: none": {"rotation": {"block": 16}},
    "low_rank: 0": {"low_rank": 2},
    "activation_scale: token": {"activation": {"bits": 8, "scope": "tensor"}},
    "activation_symmetric: true": {"activation": {"bits": 8, "symmetric": False}},
    'set keep: ["*.o_proj"], or': {"input_scale": True},
}


@pytest.mark.parametrize("hint", REFUSED)
def test_what_int8_has_no_place_for_is_refused(open_tiny, hint):
    model, _ = open_tiny("int8 of a stage")
    name = "model.layers.1.self_attn.o_proj"
    scheme = model.quantization[name]
    scheme = type(scheme).model_validate({**scheme.model_dump(), **REFUSED[hint]})
    with pytest.raises(PlanError, match="o_proj") as caught:
        check({**model.quantization, name: scheme})
    assert hint in str(caught.value.hint)


def test_nf4_does_not_round_a_second_time(open_tiny):
    model, _ = open_tiny("int8 of a stage")
    with pytest.raises(PlanError, match="rounded already") as caught:
        as_shipped(model, NF4)
    assert "leave that stage out" in str(caught.value.hint)


@pytest.mark.parametrize("format_", [NF4, INT8])
def test_other_kinds_of_models_are_refused(tiny_dit, open_quantized, tmp_path, format_):
    with pytest.raises(PlanError, match="language models"):
        write(open_quantized(tiny_dit, {}), tmp_path, format_)


def test_without_the_package_nothing_is_planned(open_tiny, tmp_path, monkeypatch):
    model, format_ = open_tiny("nf4")
    monkeypatch.setattr("compress.exporters.formats.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="bitsandbytes, which is not installed"):
        write(model, tmp_path, format_)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llm_int8_skip_modules", ["lm_head", "model.layers.0.mlp.down_proj"]),
        ("llm_int8_skip_modules", None),
        ("llm_int8_skip_modules", ["nothing"]),
        ("bnb_4bit_quant_type", "fp4"),
        ("bnb_4bit_use_double_quant", True),
        ("load_in_4bit", False),
        ("anything", 1),
    ],
)
def test_a_changed_section_is_refused(written, key, value):
    _, _, folder = written("nf4")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    for read in (compress.load, inspect):
        with pytest.raises(SourceError):
            read(folder)


def test_changed_tensors_are_refused(written):
    _, _, folder = written("nf4")
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensors, state = load_file(file), f"{name}.quant_state.bitsandbytes__nf4"
    other = bytes(tensors[state].tolist()).replace(b"float32", b"int8   ")
    for changed in (
        {**tensors, state: torch.tensor(list(other), dtype=torch.uint8)},
        {**tensors, f"{name}.quant_map": torch.zeros(16)},
        {**tensors, f"{name}.absmax": torch.ones(7)},
        {**tensors, name: torch.zeros(10, 1, dtype=torch.uint8)},
        {**tensors, f"{name}.nested_absmax": torch.ones(1)},
        {key: value for key, value in tensors.items() if key != f"{name}.absmax"},
    ):
        save_file(changed, file)
        with pytest.raises(SourceError):
            compress.load(folder)
