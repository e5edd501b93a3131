"""compressed-tensors: the package packs the same bytes, and transformers computes the same outputs."""

from __future__ import annotations

import json
from dataclasses import replace

import compress
import pytest
import torch
import transformers
from compress.errors import PlanError, SourceError
from compress.exporters.compressed_tensors_format import check, packed_words
from compress.exporters.formats import as_shipped, predict_bytes, predict_tensor_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import foreign_schemes, inspect
from compress.exporters.token_rounding import rounded_rows
from compress.models.base import TensorSpec
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from safetensors.torch import load_file, save_file

from ..tiny_moe import make_moe

FORMAT = "compressed-tensors"
A8 = {"bits": 8}
SCHEMES = {
    "W8A16": {"model.*": {"bits": 8}},
    "W8A8": {"model.*": {"bits": 8, "activation": A8}},
    "W4A16 in groups": {"model.*": {"bits": 4, "group_size": 16}},
    "mixed": {
        "*.q_proj": {"bits": 2, "activation": A8},
        "*.k_proj": {"bits": 2},
        "*.v_proj": {"bits": 4, "activation": {"bits": 8, "symmetric": False}},
        "*.o_proj": {"bits": 6, "activation": {"bits": 6}},
        "*.gate_proj": {"bits": 8, "activation": A8},
        "*.up_proj": {"bits": 3, "group_size": 16, "activation": {"bits": 4, "symmetric": False}},
    },
}
CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@pytest.fixture
def open_tiny(make_llm, open_quantized):
    """Return `open(scheme, class_name, dtype, **config)` -> OpenModel with layers of a key of SCHEMES."""

    def build(scheme, class_name="LlamaForCausalLM", dtype="float32", **config):
        return open_quantized(make_llm(class_name, dtype=dtype, **config), SCHEMES[scheme], dtype)

    return build


@pytest.fixture
def written(open_tiny, tmp_path):
    """Return `written(scheme, ...)` -> (OpenModel, folder) of a model in the format."""

    def build(scheme, *arguments, **config):
        model, folder = open_tiny(scheme, *arguments, **config), tmp_path / "written"
        folder.mkdir()
        write(model, folder, FORMAT)
        return model, folder

    return build


def outputs(module):
    with torch.no_grad():
        return module(torch.arange(40).view(2, 20) % 60).logits


def schemes(model):
    return {
        name: (s.shape, s.bits, s.group_size, s.activation, s.bias) for name, s in model.quantization.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_plain_transformers_computes_what_was_measured(written, scheme, dtype):
    class_name = CLASSES[list(SCHEMES).index(scheme) % len(CLASSES)]
    model, folder = written(scheme, class_name, dtype, tie_word_embeddings=scheme == "mixed")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert next(loaded.parameters()).dtype == getattr(torch, dtype)
    assert torch.equal(outputs(loaded), outputs(as_shipped(model, FORMAT).module))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("columns", [48, 80])
def test_the_package_packs_the_same_words(open_quantized, make_llm, bits, columns):
    model = open_quantized(
        make_llm("LlamaForCausalLM", intermediate_size=columns), {"model.*": {"bits": bits}}
    )
    layer = model.module.get_submodule("model.layers.0.mlp.down_proj")
    words = packed_words(layer)
    assert words.is_contiguous()
    assert torch.equal(words, pack_to_int32(layer.levels(), bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(layer.scheme.shape)), layer.levels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", [(2, 5, 48), (10, 48), (1, 1, 48)])
def test_inputs_are_rounded_as_the_package_does(dtype, symmetric, bits, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) * 3
    x.view(-1, 48)[0] = 0  # a token of zeros
    x.view(-1, 48)[-1].abs_()  # one that has no negative value
    x = x.to(dtype)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    layer = torch.nn.Linear(48, 4)
    layer.quantization_scheme = QuantizationScheme(targets=["Linear"], input_activations=args)
    layer.quantization_status = QuantizationStatus.INITIALIZED
    assert torch.equal(rounded_rows(x, bits, symmetric), forward_quantize(layer, x, "input", args))


def test_the_package_reads_the_section(written):
    model, folder = written("mixed")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in section.items() if k != "quant_method"})
    groups = {name: group for group in config.config_groups.values() for name in group.targets}
    assert set(groups) == set(model.quantization)
    assert section["format"] == "mixed-precision"
    for name, scheme in model.quantization.items():
        group, whole = groups[name], scheme.bits == 8 and scheme.activation is not None
        assert group.weights.num_bits == scheme.bits
        assert group.format == ("int-quantized" if whole else "pack-quantized")
        assert (group.input_activations is None) == (scheme.activation is None)
    assert sorted(section["ignore"]) == ["lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_predicts_the_bytes(open_tiny, tmp_path, scheme, tied):
    model = open_tiny(scheme, "Qwen2ForCausalLM", "bfloat16", tie_word_embeddings=tied)
    tensors = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.module.state_dict().items()
    }
    spec = replace(model.spec, tensors=tensors, quantization=model.quantization)
    info = write(model, tmp_path, FORMAT)
    assert predict_bytes(spec, FORMAT) == info.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert predict_tensor_bytes(spec, FORMAT) == info.tensor_bytes


def test_a_fresh_process_agrees_and_the_folder_opens_again(written):
    model, folder = written("mixed")
    found = verify_export(model, folder, seed=1, progress=SilentProgress())
    assert (found.verified, found.executed, found.failure) == (True, True, None), found
    assert found.ways == {"stock": 0.0, "compress": 0.0}
    assert torch.equal(outputs(compress.load(folder)), outputs(as_shipped(model, FORMAT).module))
    again = foreign_schemes(folder)
    assert {
        name: (s.shape, s.bits, s.group_size, s.activation, s.bias) for name, s in again.items()
    } == schemes(model)


def test_inspect_counts_bits_and_parameters(written):
    model, folder = written("mixed", tie_word_embeddings=True)
    found = inspect(folder)
    dense = inspect(model.source.folder)
    assert found["parameters"] == dense["parameters"]
    rows = {row["name"]: row for row in found["layers"]}
    assert set(rows) == {row["name"] for row in dense["layers"]}
    assert sum(row["bytes"] for row in rows.values()) < found["tensor_bytes"]
    for name, scheme in model.quantization.items():
        assert (rows[name]["bits"], rows[name]["method"]) == (scheme.bits, FORMAT)
    assert 3 < found["quantized_bits"] < 6


def test_the_state_of_what_is_measured_is_that_of_the_file(written):
    model, folder = written("mixed")
    state = as_shipped(model, FORMAT).module.state_dict()
    stored = load_file(folder / "model.safetensors")
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


REFUSED = {
    "weight_symmetric: true": {"symmetric": False},
    "rotation: none": {"rotation": {"block": 16}},
    "low_rank: 0": {"low_rank": 2},
    "activation_scale: token": {"activation": {"bits": 8, "scope": "tensor"}},
    'set keep: ["*.o_proj"], or': {"input_scale": True},
}


def test_the_hint_names_all_keys_to_set(open_tiny):
    schemes = {
        name: scheme.model_copy(
            update={"symmetric": False, "input_scale": name.endswith(("o_proj", "down_proj"))}
        )
        for name, scheme in open_tiny("W8A8").quantization.items()
    }
    with pytest.raises(PlanError, match="asymmetric weights") as caught:
        check(schemes)
    hint = caught.value.hint
    assert hint.startswith("set weight_symmetric: true; set keep: [") and hint.endswith("format: compress")
    assert 'keep: ["*.down_proj", "*.o_proj"]' in hint


def test_loading_draws_no_bars(written, capfd):
    _, folder = written("W8A8")
    capfd.readouterr()
    compress.load(folder)
    assert capfd.readouterr().err == ""
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert "%" in capfd.readouterr().err  # so there were some, and there still are


@pytest.mark.parametrize("hint", REFUSED)
def test_what_has_no_place_is_refused(make_llm, open_tiny, hint):
    model = open_tiny("W8A8")
    name = "model.layers.1.self_attn.o_proj"
    scheme = type(model.quantization[name]).model_validate(
        {**model.quantization[name].model_dump(), **REFUSED[hint]}
    )
    with pytest.raises(PlanError, match="o_proj") as caught:
        check({**model.quantization, name: scheme})
    assert hint in str(caught.value.hint)


def test_models_without_quantized_layers_are_refused():
    with pytest.raises(PlanError, match="no layer is quantized"):
        check({})


@pytest.mark.parametrize("format_", [FORMAT, "bitsandbytes-nf4", "bitsandbytes-int8"])
def test_mixtures_of_experts_are_refused(tmp_path, format_):
    model = open_model(
        ModelRef(id=str(make_moe(tmp_path / "moe", "MixtralForCausalLM"))), progress=SilentProgress()
    )
    with pytest.raises(PlanError, match="mixtures of experts"):
        write(model, tmp_path, format_)
    with pytest.raises(PlanError, match="mixtures of experts"):
        predict_bytes(model.spec, format_)


def test_other_kinds_of_models_are_refused(tiny_dit, open_quantized):
    model = open_quantized(tiny_dit, {"*.ff.*": {"bits": 8}})
    with pytest.raises(PlanError, match="language models"):
        write(model, tiny_dit, FORMAT)


def _change(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def _regex(section):
    section["config_groups"]["group_0"]["targets"] = ["re:.*"]


def _bits(section):
    section["config_groups"]["group_0"]["weights"]["num_bits"] = 4


def _transform(section):
    section["transform_config"] = {"config_groups": {}}


def _half(section):
    section["config_groups"]["group_0"]["targets"].pop()


def _none(section):
    section["config_groups"] = None


@pytest.mark.parametrize("change", [_regex, _bits, _transform, _half, _none])
def test_a_changed_section_is_refused(written, change):
    _, folder = written("W8A16")
    _change(folder, change)
    with pytest.raises(SourceError):
        compress.load(folder)
    with pytest.raises(SourceError):
        inspect(folder)


def test_changed_tensors_are_refused(written):
    _, folder = written("W8A16")
    file, name = folder / "model.safetensors", "model.layers.0.mlp.up_proj"
    tensors = load_file(file)
    for changed in (
        {**tensors, f"{name}.weight_shape": torch.tensor([80, 2**40])},
        {**tensors, f"{name}.weight_scale": torch.ones(80, 2)},
        {**tensors, f"{name}.weight_packed": torch.zeros(80, 12)},
        {**tensors, f"{name}.weight_zero_point": torch.zeros(80, 1)},
        {key: value for key, value in tensors.items() if key != f"{name}.weight_scale"},
        {key: value for key, value in tensors.items() if key != "model.norm.weight"},
    ):
        save_file(changed, file)
        for read in (compress.load, inspect):
            with pytest.raises(SourceError):
                read(folder)
