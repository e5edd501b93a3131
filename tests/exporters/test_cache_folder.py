"""Folders with a compressed cache, in each format, loaded each way: equal bits, and damage is found."""

from __future__ import annotations

import copy
import json

import compress
import pytest
import torch
import transformers
from compress.errors import SourceError, UsageError
from compress.exporters.folder_comparison import compare_folders
from compress.exporters.formats import as_shipped, predict_bytes, write
from compress.exporters.fresh_process import verify_export
from compress.exporters.inspection import inspect
from compress.models.base import TensorSpec
from compress.progress import SilentProgress
from compress.runtime.kv.attach import kv_scheme_of
from compress.runtime.kv.scheme import factor_tensors
from compress.runtime.kv.sizes import cache_bytes
from compress.runtime.load import read_checkpoint
from compress.runtime.validate import open_folder
from safetensors.torch import load_file, save_file

from ..tiny_cache import decoded, save_llama, with_cache
from ..tiny_moe import make_moe

FACTOR = "model.layers.0.self_attn.cskv.k_b.weight"
QUIET = SilentProgress()


@pytest.fixture
def export(tmp_path):
    """Return `export(format, **with_cache)` -> (model in memory, its folder)."""

    def build(format="compress", *, source=None, **options):
        model = with_cache(source or save_llama(tmp_path / "model", torch.bfloat16), **options)
        out = tmp_path / "out"
        out.mkdir()
        assert write(model, out, format).bytes == predict_bytes(_planned(model), format)
        return model, out

    return build


def _planned(model):
    """The spec of a model as its stages would have planned it."""
    state, factors = model.module.state_dict(), factor_tensors(model.kv_cache)
    tensors = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in state.items()
        if name not in factors
    }
    spec = model.spec.evolve(tensors=tensors, quantization=model.quantization)
    return spec.with_kv_cache(model.kv_cache)


def _from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def test_quantized_layers_and_a_compressed_cache_load_both_ways(export):
    model, out = export(quantized=True, bits=4)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(section["kv_cache"]["layers"]) == set(model.kv_cache.layers)
    expected = decoded(model.module)
    for loaded in (compress.load(out), _from_pretrained(out), read_checkpoint(out)[0]):
        assert kv_scheme_of(loaded) == model.kv_cache
        assert torch.equal(decoded(loaded), expected)
        assert type(next(loaded.parameters())) is torch.nn.Parameter


def test_saved_again_it_has_its_cache_again(export, tmp_path):
    model, out = export(quantized=True)
    for number, loaded in enumerate((compress.load(out), _from_pretrained(out))):
        again = tmp_path / f"again{number}"
        loaded.save_pretrained(again)
        assert open_folder(again).manifest.kv_cache == model.kv_cache
        assert torch.equal(decoded(compress.load(again)), decoded(model.module))
    loaded.get_submodule("model.layers.0.self_attn").cskv.k_b.weight.data = torch.zeros(32, 9)
    with pytest.raises(SourceError, match=f"{FACTOR} is not what was loaded"):
        loaded.save_pretrained(tmp_path / "other")


def test_a_dense_model_is_saved_with_its_manifest(export, tmp_path):
    model, out = export()
    loaded = compress.load(out)
    copy.deepcopy(loaded).save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = compress.load(tmp_path / "again")
    assert torch.equal(decoded(again), decoded(model.module))
    with pytest.raises(UsageError, match="push_to_hub"):
        loaded.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    changed = copy.deepcopy(loaded)
    changed.get_submodule("model.layers.0.self_attn").cskv.k_b.weight.data = torch.zeros(32, 9)
    with pytest.raises(SourceError, match=f"{FACTOR} is not what was loaded"):
        changed.save_pretrained(tmp_path / "other")
    loaded.save_pretrained(tmp_path / "third")  # the one that was loaded is as it was


def test_config_and_manifest_must_agree_about_the_cache(export):
    _, out = export(quantized=True)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache"]["window"] = 5
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="disagree about the cache of model.layers.0.self_attn"):
        compress.load(out)
    del config["quantization_config"]["kv_cache"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="disagree about the cache"):
        compress.load(out)


@pytest.mark.parametrize("name", ["missing", "narrow"])
def test_the_stock_class_refuses_damaged_factors_of_a_quantized_model(export, name):
    _, out = export(quantized=True)
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[FACTOR] = tensors[FACTOR][:, :2].contiguous()
    if name == "missing":
        del tensors[FACTOR]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SourceError, match=f"tensor {FACTOR} is "):
        _from_pretrained(out)


def test_rounded_to_floats_the_cache_stays_compressed(export):
    model, out = export("dequantized", quantized=True, mode="block", window=6)
    shipped = as_shipped(model, "dequantized")
    assert shipped.kv_cache == model.kv_cache == kv_scheme_of(shipped.module)
    assert torch.equal(decoded(compress.load(out)), decoded(shipped.module))
    ids, options = torch.arange(12)[None], {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(shipped.module.generate(ids, **options), compress.load(out).generate(ids, **options))
    _, info = _from_pretrained(out, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(factor_tensors(model.kv_cache))


@pytest.mark.parametrize(
    ("format", "package", "quantized"),
    [
        ("compressed-tensors", "compressed_tensors", True),
        ("bitsandbytes-int8", "bitsandbytes", True),
        ("bitsandbytes-nf4", "bitsandbytes", False),
    ],
)
def test_in_the_format_of_another_package_the_cache_stays_compressed(
    export, tmp_path, format, package, quantized
):
    pytest.importorskip(package)
    source = save_llama(tmp_path / "model", torch.bfloat16, hidden_size=128, intermediate_size=256)
    model, out = export(format, source=source, quantized=quantized, bits=4)
    expected = decoded(as_shipped(model, format).module)
    loaded = compress.load(out)
    assert kv_scheme_of(loaded) == model.kv_cache and torch.equal(decoded(loaded), expected)
    _, info = _from_pretrained(out, output_loading_info=True)
    assert set(info.pop("unexpected_keys")) == set(factor_tensors(model.kv_cache))
    assert not any(info.values())
    path = out / "model.safetensors"
    save_file({**load_file(path), "model.extra": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.extra belongs to no layer"):
        compress.load(out)


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"])
def test_a_mixture_of_experts_keeps_its_factors(export, tmp_path, class_name):
    model, out = export(source=make_moe(tmp_path / "moe", class_name))
    assert torch.equal(decoded(compress.load(out)), decoded(model.module))
    _, info = _from_pretrained(out, output_loading_info=True)
    assert set(info.pop("unexpected_keys")) == set(factor_tensors(model.kv_cache))
    assert not any(info.values())


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
@pytest.mark.parametrize("format", ["compress", "dequantized"])
def test_a_quantized_mixture_of_experts_keeps_its_factors(tmp_path, class_name, format):
    model = with_cache(make_moe(tmp_path / "moe", class_name, dtype="bfloat16"), quantized=True, bits=4)
    out = tmp_path / "out"
    out.mkdir()
    write(model, out, format)
    expected = decoded(as_shipped(model, format).module)
    assert torch.equal(decoded(compress.load(out)), expected)
    stock, info = _from_pretrained(out, output_loading_info=True)
    if format == "compress":
        assert torch.equal(decoded(stock), expected)
    else:
        assert set(info.pop("unexpected_keys")) == set(factor_tensors(model.kv_cache))
    assert not any(info.values())


@pytest.mark.parametrize(
    ("format", "options", "ways"),
    [
        ("compress", {"bits": 2}, {"stock", "compress"}),
        pytest.param(
            "compress",
            {"quantized": True, "mode": "block"},
            {"registered", "compress"},
            marks=pytest.mark.slow,
        ),
        pytest.param("dequantized", {"quantized": True}, {"stock", "compress"}, marks=pytest.mark.slow),
    ],
)
def test_a_fresh_process_decodes_equal_bits(export, format, options, ways):
    model, out = export(format, **options)
    found = verify_export(model, out, seed=3, progress=QUIET)
    assert found.failure is None and found.verified and found.executed
    assert found.max_abs_error == 0.0 and set(found.ways) == ways
    assert "a fresh process decodes 8 tokens through the compressed cache" in found.notes[-1]


def test_a_changed_factor_is_found_by_decoding_alone(export):
    model, out = export()
    path = out / "model.safetensors"
    tensors = load_file(path)
    tensors[FACTOR][0, 0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    found = verify_export(model, out, seed=3, progress=QUIET)
    assert not found.verified and found.executed
    assert found.ways["stock"] == 0.0 < found.ways["compress"] == found.max_abs_error
    assert "the 'compress' way in a fresh process, what it decodes through the compressed" in found.failure
    assert "stock" not in found.failure and "the outputs differ" not in found.failure
    assert found.notes == (found.failure,)


@pytest.mark.slow
def test_a_tensor_that_is_no_factor_is_found(export):
    model, out = export()
    path = out / "model.safetensors"
    save_file({**load_file(path), "model.extra": torch.zeros(3)}, path, {"format": "pt"})
    found = verify_export(model, out, seed=3, progress=QUIET)
    assert not found.verified and not found.executed
    assert "the stock loader reports" in found.failure and "model.extra" in found.failure


def test_a_folder_with_another_cache_is_found_before_it_is_run(export):
    model, out = export()
    model.kv_cache = model.kv_cache.model_copy(update={"window": 9})
    failure = verify_export(model, out, seed=3, progress=QUIET).failure
    assert failure == "the folder's manifest does not say how the cache is compressed as the model does"


@pytest.mark.slow
def test_a_copy_with_another_factor_is_found(export, tmp_path):
    _, out = export()
    other = tmp_path / "other"
    other.mkdir()
    for file in out.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert compare_folders(out, other, progress=QUIET).failure is None
    tensors = load_file(other / "model.safetensors")
    tensors[FACTOR][0, 0] += 0.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    failure = compare_folders(out, other, progress=QUIET).failure
    assert failure == "loaded the 'compress' way, it decodes otherwise through the compressed cache"


def test_inspect_tells_of_the_cache(export):
    model, out = export(bits=4)
    found = inspect(out)
    told = found["kv_cache"]
    assert found["parameters"] == model.size().parameters and found["tensor_bytes"] == model.size().bytes
    assert not [row for row in found["layers"] if "cskv" in row["name"]]
    assert told["bytes_per_token"]["before"] == 2 * 2 * 32 * 2
    assert told["bytes_per_token"]["after"] == model.size().kv_bytes_per_token
    assert (told["window"], told["mode"], told["bits"]) == (4, "sliding", 4)
    assert told["factor_bytes"] == 2 * told["factor_parameters"] == 2 * (64 + 32) * (3 + 5 + 4 + 6)
    whole = cache_bytes(model.kv_cache, 128, 1, 2)
    assert told["at_context"] == {
        "tokens": 128, "before": 128 * 256, "after": whole, "with_factors": whole + told["factor_bytes"]
    }  # fmt: skip
    assert told["break_even_tokens_one"] > told["break_even_tokens"]
    assert told["layers"][1] == {
        "name": "model.layers.1.self_attn", "width": 32, "rank_k": 4, "rank_v": 6
    }  # fmt: skip
    assert inspect(out.parent / "model")["kv_cache"] is None


def test_a_record_that_does_not_fit_the_module_is_not_written(export, tmp_path):
    model, _ = export()
    model.kv_cache = None
    for format in ("compress", "dequantized"):
        with pytest.raises(ValueError, match="the factors of the model's cache"):
            write(model, tmp_path, format)
