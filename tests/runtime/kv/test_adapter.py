"""An adapter of a compressed cache: loaded onto its original bit for bit, and refused on any other model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import compress
import pytest
import torch
from compress.errors import SourceError, UsageError
from compress.exporters.formats import write
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.hashes import file_sha256
from compress.runtime.kv.adapter import base_folder, is_adapter, open_adapter
from compress.runtime.kv.assembled import open_whole
from compress.runtime.kv.attach import kv_scheme_of
from compress.runtime.kv.base_hash import attention_sha256
from compress.runtime.validate import open_folder, read_header
from safetensors.torch import load_file, save_file

from ...tiny_cache import decoded, quantize_linears, save_llama, with_cache
from ...tiny_moe import make_moe

FACTOR = "model.layers.1.self_attn.cskv.v_b.weight"


def _written(model, folder: Path) -> Path:
    folder.mkdir()
    write(model, folder, "compress", kv_cache="adapter")
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return _written(with_cache(save_llama(tmp_path / "model")), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.float32, {"mode": "block", "window": 8, "bits": 2}),
        (torch.bfloat16, {"bits": 4}),
    ],
)
def test_it_decodes_the_same_bits(tmp_path, dtype, changes):
    model = with_cache(save_llama(tmp_path / "model", dtype), **changes)
    folder = _written(model, tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir()) == ["cskv.json", "cskv.safetensors"]
    loaded = compress.load(folder)
    assert kv_scheme_of(loaded) == model.kv_cache and not loaded.training
    expected = decoded(model.module)
    assert torch.equal(decoded(loaded), expected)
    assert loaded.dtype == dtype and expected.isfinite().all()
    ids = torch.arange(12)[None]
    mine, theirs = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (model.module, loaded))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("class_name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"])
def test_experts_stay_with_the_original(tmp_path, class_name):
    model = with_cache(make_moe(tmp_path / "model", class_name))
    folder = _written(model, tmp_path / "adapter")
    assert torch.equal(decoded(compress.load(folder)), decoded(model.module))


def test_the_original_may_lie_elsewhere_and_in_other_files(adapter, tmp_path):
    expected = decoded(compress.load(adapter))
    stock = compress.load(tmp_path / "model")
    stock.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shutil.rmtree(tmp_path / "model")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    with pytest.raises(
        SourceError, match="cskv.json: made for the folder .*model, which is not here"
    ) as told:
        compress.load(adapter)
    assert "`base`" in told.value.hint
    assert torch.equal(decoded(compress.load(adapter, base=tmp_path / "shards")), expected)
    assert torch.equal(decoded(compress.load(str(adapter), base=str(tmp_path / "shards"))), expected)


def test_a_built_in_model_is_found_by_its_name(tmp_path):
    model = with_cache("builtin:stories")
    folder = _written(model, tmp_path / "adapter")
    document = json.loads((folder / "cskv.json").read_text())
    assert document["base"]["id"] == "builtin:stories" and document["base"]["revision"] is None
    assert torch.equal(decoded(compress.load(folder)), decoded(model.module))
    assert torch.equal(decoded(compress.load(folder, base="builtin:stories")), decoded(model.module))


def test_a_type_may_be_chosen(adapter, tmp_path):
    loaded = compress.load(adapter, dtype="bfloat16")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    whole = compress.load(adapter)
    assert torch.equal(loaded.get_parameter(FACTOR), whole.get_parameter(FACTOR).bfloat16())


def test_the_type_of_the_recipe_is_that_of_the_loaded_model(tmp_path):
    model = with_cache(save_llama(tmp_path / "model"), dtype="bfloat16")
    loaded = compress.load(_written(model, tmp_path / "adapter"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(decoded(loaded), decoded(model.module))


def test_an_original_that_compress_made_serves_if_keys_and_values_are_as_they_were(adapter, tmp_path):
    for name, keep in (("kept", ("k_proj", "v_proj")), ("all", ())):
        model = open_model(ModelRef(id=str(tmp_path / "model")), progress=SilentProgress())
        quantize_linears(model, keep=keep)
        (tmp_path / name).mkdir()
        write(model, tmp_path / name, "compress")
    loaded = compress.load(adapter, base=tmp_path / "kept")
    assert kv_scheme_of(loaded) is not None
    assert type(loaded.get_submodule("model.layers.0.mlp.up_proj")).__name__ == "QuantizedLinear"
    assert not torch.equal(decoded(loaded), decoded(compress.load(adapter)))
    with pytest.raises(SourceError, match=r"layers\.0\.self_attn\.k_proj of .*all is quantized"):
        compress.load(adapter, base=tmp_path / "all")


def other_weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1
    save_file(tensors, path, {"format": "pt"})
    return folder


def other_class(folder: Path) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    config = json.loads((folder / "config.json").read_text())
    shutil.rmtree(folder)
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: config[key] for key in keys}
    MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2)).save_pretrained(folder)
    return folder


def shallower(folder: Path) -> Path:
    return save_llama(folder, num_hidden_layers=1)


def narrower(folder: Path) -> Path:
    return save_llama(folder, num_key_value_heads=1)


def other_positions(folder: Path) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    path.write_text(json.dumps(config))
    return folder


def compressed_already(folder: Path) -> Path:
    model = with_cache(folder)
    other = folder.with_name("compressed")
    other.mkdir()
    write(model, other, "compress")
    return other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, r"of model\.layers\.1\.self_attn in .*model are not those .*\(SHA-256\)$"),
        (other_class, "made for a LlamaForCausalLM, and .*model is a MistralForCausalLM"),
        (shallower, r"model has no model\.layers\.1\.self_attn, which the adapter has factors for"),
        (narrower, r"k_proj of .* has shape \[16, 64\]; the adapter was made for \[32, 64\]"),
        (other_positions, "made for rope_parameters .*10000.*, and .*model has .*5000"),
        (compressed_already, "its cache is compressed already"),
    ],
)
def test_another_model_is_refused(adapter, tmp_path, change, words):
    base = change(tmp_path / "model")
    with pytest.raises(SourceError, match=words) as told:
        compress.load(adapter, base=base)
    assert told.value.hint


@pytest.mark.parametrize(
    ("class_name", "key", "value"),
    [
        ("Qwen3MoeForCausalLM", "rms_norm_eps", 0.5),
        ("OlmoeForCausalLM", "clip_qkv", 0.25),
        ("MixtralForCausalLM", "rms_norm_eps", None),  # keys have no norm: the others are not ours
    ],
)
def test_what_keys_pass_through_must_be_as_it_was(tmp_path, class_name, key, value):
    source = make_moe(tmp_path / "model", class_name, **({"clip_qkv": 0.5} if key == "clip_qkv" else {}))
    folder = _written(with_cache(source), tmp_path / "adapter")
    config = json.loads((source / "config.json").read_text())
    config[key] = value or 0.5
    (source / "config.json").write_text(json.dumps(config))
    if value is None:
        assert key not in open_adapter(folder).document.base.sizes
        compress.load(folder)
        return
    with pytest.raises(SourceError, match=rf"made for {key} .*, and .*model has {value}"):
        compress.load(folder)


def test_all_layers_that_differ_are_counted(adapter, tmp_path):
    shutil.rmtree(tmp_path / "model")
    stranger = compress.load(save_llama(tmp_path / "model"))
    for layer in stranger.model.layers:
        layer.self_attn.k_proj.weight.data += 1
    stranger.save_pretrained(tmp_path / "model")
    with pytest.raises(SourceError, match=r"of model\.layers\.0\.self_attn .*, nor are those of 1 more"):
        compress.load(adapter)


def test_the_hash_tells_types_and_norms_apart(tmp_path):
    """Equal bytes of another type are other numbers, and keys pass through their norm."""
    path, name = tmp_path / "model" / "model.safetensors", "model.layers.0.self_attn"
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        save_llama(tmp_path / "model", torch.bfloat16)
        save_file({key: value.view(dtype) for key, value in load_file(path).items()}, path, {"format": "pt"})
        found.append(attention_sha256(name, open_folder(tmp_path / "model").tensors))
    assert found[0] != found[1]
    tensors = {f"{name}.{part}.weight": torch.ones(4) for part in ("k_proj", "v_proj", "k_norm")}
    for value in (1.0, 2.0):
        tensors[f"{name}.k_norm.weight"] *= value
        save_file(tensors, tmp_path / "norms.safetensors")
        found.append(attention_sha256(name, read_header(tmp_path / "norms.safetensors")[0]))
    assert found[2] != found[3]


def test_the_hash_is_of_what_factors_rest_on(tmp_path):
    first = open_folder(save_llama(tmp_path / "model", attention_bias=True)).tensors
    name = "model.layers.0.self_attn"
    before = attention_sha256(name, first)
    for changed, counts in (("k_proj.bias", True), ("v_proj.weight", True), ("q_proj.weight", False)):
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        tensors[f"{name}.{changed}"].view(-1)[-1] += 1
        save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        after = attention_sha256(name, open_folder(tmp_path / "model").tensors)
        assert (after != before) == counts, changed
        before = after
    with pytest.raises(SourceError, match="has no projections"):
        attention_sha256("model.layers.7.self_attn", first)


def drop(tensors, _):
    del tensors[FACTOR]


def transpose(tensors, _):
    tensors[FACTOR] = tensors[FACTOR].t().contiguous()


def halves(tensors, _):
    tensors[FACTOR] = tensors[FACTOR].half()


def add(tensors, _):
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 64)


def not_a_number(tensors, _):
    tensors[FACTOR][0, 0] = torch.nan


def infinite(tensors, _):
    tensors[FACTOR][-1, -1] = torch.inf


def other_ranks(_, document):
    document["scheme"]["layers"]["model.layers.1.self_attn"]["rank_v"] = 5


def huge(_, document):
    document["scheme"]["layers"]["model.layers.1.self_attn"].update(width=2**40, hidden=2**40)


def negative_window(_, document):
    document["scheme"]["window"] = -1


def newer(_, document):
    document["version"] = 2


def other_format(_, document):
    document["format"] = "peft"


def unknown_key(_, document):
    document["base"]["trust_remote_code"] = True


def fewer_hashes(_, document):
    document["base"]["hashes"].popitem()


def no_hash(_, document):
    document["base"]["hashes"]["model.layers.1.self_attn"] = "0" * 63


def folder_of_a_commit(_, document):
    document["base"].update(id="/etc/model", revision="a" * 40)


def outside(_, document):
    document["base"]["subfolder"] = "../secret"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, rf"cskv\.safetensors: tensor {FACTOR} is missing"),
        (transpose, rf"cskv\.safetensors: tensor {FACTOR} is F32 \[6, 32\]; cskv.json implies F32 \[32, 6\]"),
        (halves, rf"tensor {FACTOR} is F16 \[32, 6\]; cskv.json implies F32"),
        (add, r"cskv\.safetensors: tensor model\.layers\.0\.self_attn\.k_proj\.weight is no factor"),
        (not_a_number, rf"cskv\.safetensors: tensor {FACTOR} holds what is no finite number"),
        (infinite, rf"cskv\.safetensors: tensor {FACTOR} holds what is no finite number"),
        (other_ranks, rf"{FACTOR.replace('v_b', 'v_a')} is F32 \[6, 64\]; cskv.json implies F32 \[5, 64\]"),
        (huge, r"cskv\.json: scheme\.layers\.model\.layers\.1\.self_attn\.hidden"),
        (negative_window, r"cskv\.json: scheme\.window"),
        (newer, r"cskv\.json: version 2; this release reads version 1"),
        (other_format, r"cskv\.json: format"),
        (unknown_key, r"cskv\.json: base\.trust_remote_code"),
        (fewer_hashes, r"cskv\.json: .*name other attentions"),
        (no_hash, r"cskv\.json: base\.hashes"),
        (outside, r"cskv\.json: base\.subfolder"),
        (folder_of_a_commit, r"cskv\.json: base: .*'/etc/model' has a revision, and is no repository"),
    ],
)
def test_a_damaged_adapter_is_refused_by_file_and_name(adapter, change, words):
    path, json_path = adapter / "cskv.safetensors", adapter / "cskv.json"
    tensors, document = load_file(path), json.loads(json_path.read_text())
    change(tensors, document)
    save_file(tensors, path, {"format": "pt"})
    document["factors_sha256"] = file_sha256(path)  # what follows is refused by itself, not by this
    json_path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=words) as told:
        compress.load(adapter)
    assert str(adapter) in told.value.message and told.value.hint


REQUIRED = (
    "format", "version", "dtype", "factors_sha256", "history", "scheme.window", "scheme.mode",
    "scheme.bits", "scheme.key_group", "scheme.layers", "base.revision", "base.subfolder", "base.hashes",
)  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
def test_no_key_has_a_default(adapter, key):
    path = adapter / "cskv.json"
    document = json.loads(path.read_text())
    *places, last = key.split(".")
    holder = document
    for place in places:
        holder = holder[place]
    del holder[last]
    path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=rf"cskv\.json: {key}: Field required"):
        compress.load(adapter)


@pytest.mark.parametrize("place", [0, 20, -1, "pt", "number"])
def test_one_flipped_bit_of_the_factors_is_refused(adapter, place):
    """Wherever it is: in the length, the header, a text of it that nothing else reads, a number."""
    path = adapter / "cskv.safetensors"
    data = bytearray(path.read_bytes())
    if isinstance(place, str):
        place = data.index(b'"pt"') + 1 if place == "pt" else read_header(path)[0][FACTOR].start
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match=r"cskv\.safetensors") as told:
        compress.load(adapter)
    assert str(adapter) in told.value.message


def test_other_factors_are_refused_by_their_hash(adapter):
    path = adapter / "cskv.safetensors"
    tensors = load_file(path)
    tensors[FACTOR][0, 0] += 2**-20
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(SourceError, match=r"cskv\.safetensors: its bytes are not those .*\(SHA-256\)"):
        compress.load(adapter)
    with pytest.raises(SourceError, match=r"cskv\.safetensors: its bytes"):
        open_whole(adapter)


@pytest.mark.parametrize("name", ["cskv.safetensors", "cskv.json"])
@pytest.mark.parametrize("left", [0, 7, 500, -2])
def test_a_truncated_file_is_refused_by_name(adapter, name, left):
    path = adapter / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(SourceError, match=name.replace(".", r"\.")):
        compress.load(adapter)


def test_what_is_missing_is_named_and_pickles_are_not_opened(adapter):
    (adapter / "cskv.safetensors").rename(adapter.parent / "away")
    with pytest.raises(SourceError, match=r"cskv\.safetensors does not exist"):
        compress.load(adapter)
    (adapter / "cskv.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(SourceError, match=r"cskv\.bin: the factors are pickled"):
        compress.load(adapter)
    (adapter.parent / "away").rename(adapter / "cskv.safetensors")
    (adapter / "cskv.json").unlink()
    with pytest.raises(SourceError, match=r"cskv\.json does not exist"):
        compress.load(adapter)


def test_a_name_from_elsewhere_reads_no_folder_of_this_machine(adapter, tmp_path):
    found = open_adapter(adapter)
    assert base_folder(found) == tmp_path / "model"
    with pytest.raises(SourceError, match="which is not here"):
        base_folder(found, is_local=False)


def test_a_whole_model_has_no_base(adapter, tmp_path):
    assert is_adapter(adapter) and not is_adapter(tmp_path / "model") and not is_adapter(tmp_path / "none")
    with pytest.raises(UsageError, match="is a whole model"):
        compress.load(tmp_path / "model", base=tmp_path / "model")


def test_the_same_model_writes_the_same_bytes(adapter, tmp_path):
    again = _written(with_cache(tmp_path / "model"), tmp_path / "again")
    for path in adapter.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
