"""A folder with a compressed cache: loaded bit for bit, stock all the same, and refused when damaged."""

from __future__ import annotations

import json

import compress
import pytest
import torch
from compress.errors import SourceError
from compress.exporters.formats import predict_bytes, write
from compress.runtime.kv.attach import kv_scheme_of
from compress.runtime.kv.scheme import factor_tensors
from compress.runtime.manifest import Manifest
from compress.runtime.validate import open_folder
from safetensors.torch import load_file, save_file

from ...tiny_cache import decoded, save_llama, scheme_of, with_cache

FACTOR = "model.layers.1.self_attn.cskv.v_b.weight"


@pytest.fixture
def exported(tmp_path):
    model = with_cache(save_llama(tmp_path / "model"), bits=4)
    out = tmp_path / "out"
    out.mkdir()
    info = write(model, out, "compress")
    return model, out, info


def test_loaded_again_it_decodes_the_same_bits(exported):
    model, out, _ = exported
    loaded = compress.load(out)
    assert kv_scheme_of(loaded) == model.kv_cache
    assert torch.equal(decoded(loaded), decoded(model.module))
    ids = torch.arange(12)[None]
    mine, theirs = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model.module, loaded))
    assert torch.equal(mine, theirs)


def test_the_cache_that_generates_is_the_compressed_one(exported):
    loaded = compress.load(exported[1])
    kept = loaded.generate(
        torch.arange(12)[None], max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    assert type(kept).__name__ == "CskvCache"


def test_stock_code_finds_the_model_of_before_and_names_the_factors(exported, tmp_path):
    import transformers

    model, out, _ = exported
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert set(info.pop("unexpected_keys")) == set(factor_tensors(model.kv_cache))
    assert not any(info.values())
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, before(ids).logits)


def test_the_plan_predicts_the_bytes(exported):
    model, _, info = exported
    spec = model.spec.with_kv_cache(model.kv_cache)
    assert predict_bytes(spec, "compress") == info.bytes
    assert spec.size() == model.size()
    with pytest.raises(ValueError, match="already"):
        spec.with_kv_cache(model.kv_cache)


def test_sizes_tell_factors_from_parameters(exported):
    model = exported[0]
    before, after = model.spec.size(), model.size()
    added = sum(4 * rows * columns for rows, columns in factor_tensors(model.kv_cache).values())
    assert (after.bytes - before.bytes, after.parameters) == (added, before.parameters)
    assert before.kv_bytes_per_token == 2 * 2 * 32 * 4
    assert before.to_json()["kv_bytes_per_token"] == 512
    assert after.kv_bytes_per_token < before.kv_bytes_per_token / 4


def test_a_layer_that_is_left_out_counts_in_full(tmp_path):
    model = with_cache(save_llama(tmp_path / "model"))
    one = dict(list(model.kv_cache.layers.items())[:1])
    spec = model.spec.with_kv_cache(model.kv_cache.model_copy(update={"layers": one}))
    assert spec.size().kv_bytes_per_token == 2 * 32 * 4 + (3 + 5) * 4


def drop(tensors, _):
    del tensors[FACTOR]


def transpose(tensors, _):
    tensors[FACTOR] = tensors[FACTOR].t().contiguous()


def integers(tensors, _):
    tensors[FACTOR] = torch.zeros(tensors[FACTOR].shape, dtype=torch.int8)


def add(tensors, _):
    tensors["model.layers.7.self_attn.cskv.v_b.weight"] = torch.zeros(3)


def forget(_, manifest):
    del manifest["kv_cache"]


def elsewhere(_, manifest):
    layers = manifest["kv_cache"]["layers"]
    layers["model.layers.1.mlp"] = layers.pop("model.layers.1.self_attn")


def narrower(tensors, manifest):
    manifest["kv_cache"]["layers"]["model.layers.1.self_attn"]["width"] = 16
    for name in ("k_b", "v_b"):
        name = f"model.layers.1.self_attn.cskv.{name}.weight"
        tensors[name] = tensors[name][:16].contiguous()


def beyond(_, manifest):
    manifest["kv_cache"]["layers"]["model.layers.1.self_attn"]["rank_v"] = 33


def huge(_, manifest):
    manifest["kv_cache"]["window"] = 10**12


def negative(_, manifest):
    manifest["kv_cache"]["window"] = -1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, f"tensor {FACTOR} is missing"),
        (transpose, rf"tensor {FACTOR} is F32 \[6, 32\]; the manifest implies floating point \[32, 6\]"),
        (integers, f"tensor {FACTOR} is I8"),
        (add, "model.layers.7.self_attn.cskv.v_b.weight is a factor of a cache that the manifest"),
        (forget, "cskv.k_a.weight is a factor of a cache that the manifest does not list"),
        (elsewhere, "model.layers.1.mlp.cskv.k_a.weight is missing"),
        (narrower, "compress.json: .*model.layers.1.self_attn"),
        (beyond, "rank_v 33 is above the 32 channels"),
        (huge, "kv_cache.window"),
        (negative, "kv_cache.window"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(exported, change, words):
    _, out, _ = exported
    path = out / "model.safetensors"
    tensors, manifest = load_file(path), json.loads((out / "compress.json").read_text())
    change(tensors, manifest)
    save_file(tensors, path, {"format": "pt"})
    (out / "compress.json").write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match=words):
        compress.load(out)


@pytest.mark.parametrize("key", ["window", "mode", "bits", "key_group"])
def test_a_scheme_that_lacks_a_key_is_refused(exported, key):
    """A default in its place would be another cache: 4 bits would be none."""
    path = exported[1] / "compress.json"
    manifest = json.loads(path.read_text())
    del manifest["kv_cache"][key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(SourceError, match=rf"compress\.json: kv_cache\.{key}: Field required"):
        compress.load(exported[1])


def test_a_truncated_file_is_refused(exported):
    path = exported[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        compress.load(exported[1])


def test_a_cache_of_another_kind_of_model_is_refused(tiny_dit):
    Manifest(kv_cache=scheme_of({"_class_name": "LlamaForCausalLM", "vocab_size": 9, "hidden_size": 64,
        "intermediate_size": 9, "num_hidden_layers": 1, "num_attention_heads": 4}))  # fmt: skip
    manifest = Manifest(
        kv_cache=scheme_of(
            {"_class_name": "LlamaForCausalLM", "vocab_size": 9, "hidden_size": 64, "intermediate_size": 9,
             "num_hidden_layers": 1, "num_attention_heads": 4}
        )
    )  # fmt: skip
    (tiny_dit / "compress.json").write_text(manifest.to_json())
    with pytest.raises(SourceError, match="no language model"):
        open_folder(tiny_dit)


def test_another_dtype_casts_the_factors(exported):
    loaded = compress.load(exported[1], dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.bfloat16}
    assert decoded(loaded).isfinite().all()


def test_a_manifest_without_a_cache_is_what_it_was():
    assert "kv_cache" not in json.loads(Manifest().to_json())


def test_a_compressed_folder_is_no_source(exported):
    from compress.models.checkpoint import locate
    from compress.recipes.schema import ModelRef

    with pytest.raises(SourceError, match="already compressed"):
        locate(ModelRef(id=str(exported[1])))
