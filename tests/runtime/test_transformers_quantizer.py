"""Language models in our format, through transformers' own loader and through ours."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module

import compress
import pytest
import torch
import transformers
from compress.errors import PlanError, SourceError
from compress.exporters.formats import as_shipped, predict_bytes, write
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.linear import QuantizedLinear
from compress.runtime.load import read_checkpoint
from compress.runtime.validate import open_folder
from safetensors.torch import load_file, save_file

GUARD = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def exported_llm(make_llm, quantize_all, tmp_path):
    """Return `make(class_name, dtype, format, **config)` -> (model in memory, its exported folder)."""

    def make(class_name="LlamaForCausalLM", dtype="bfloat16", format="compress", **config):
        source = make_llm(class_name, dtype=dtype, **config)
        model = open_model(ModelRef(id=str(source)), progress=SilentProgress())
        quantize_all(model)
        folder = tmp_path / f"out-{format}"
        folder.mkdir()
        info = write(model, folder, format)
        return model, folder, info

    return make


@pytest.fixture
def quantize_all():
    """Return a function that rounds every linear but the head to 4 bits, biases and zero points included."""

    def quantize(model):
        from compress.runtime import packing
        from compress.runtime.manifest import ActivationScheme, QuantizedModule

        for site in model.linears():
            if site.role == "head":
                continue
            linear = model.module.get_submodule(site.name)
            scheme = QuantizedModule(
                shape=site.shape, bits=4, symmetric=False, bias=linear.bias is not None, method="test",
                activation=ActivationScheme(bits=8),
            )  # fmt: skip
            weight = linear.weight.float()
            low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
            scale = (high - low) / 15
            zero = torch.round(low / scale) + 8
            q = (torch.round(weight / scale) - zero).clamp(-8, 7).to(torch.int8)
            tensors = {"qweight": packing.pack(q, 4), "scale": scale, "zero_point": zero.to(torch.int8)}
            if linear.bias is not None:
                tensors["bias"] = linear.bias.detach()
            layer = QuantizedLinear.from_tensors(scheme, linear.weight.dtype, tensors)
            owner, _, attribute = site.name.rpartition(".")
            setattr(model.module.get_submodule(owner), attribute, layer)
            model.quantization[site.name] = scheme

    return quantize


def _logits(module):
    ids = torch.arange(40).reshape(2, 20) % 60
    with torch.no_grad():
        return module.eval()(input_ids=ids, use_cache=False).logits


def _from_pretrained(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("class_name", "config"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("MistralForCausalLM", {}),
        ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
        ("Qwen3ForCausalLM", {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_loaders_give_the_bits_of_memory(class_name, config, dtype, exported_llm):
    model, folder, info = exported_llm(class_name, dtype, **config)
    expected = _logits(model.module)
    stock, report = _from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    ours = compress.load(folder)
    for module in (stock, ours):
        assert type(module).__name__ == class_name
        layer = module.model.layers[1].mlp.up_proj
        assert isinstance(layer, QuantizedLinear) and layer.scale.dtype == torch.float32
        assert torch.equal(_logits(module), expected)
        tied = module.lm_head.weight is module.model.embed_tokens.weight
        assert tied == bool(config)
    state = model.module.state_dict()
    for name, tensor in stock.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert info.loads_with == [
        "compress.load(path)", "import compress; transformers.AutoModelForCausalLM.from_pretrained(path)",
    ]  # fmt: skip


def test_the_files_are_those_of_transformers(exported_llm, make_llm):
    model, folder, info = exported_llm(tie_word_embeddings=True)
    assert info.files == ["compress.json", "config.json", "model.safetensors"]
    tensors = load_file(folder / "model.safetensors")
    assert tensors.pop(GUARD).shape == (0,)
    assert "lm_head.weight" not in tensors and open_folder(folder).manifest.shared == {}
    assert sum(tensor.nbytes for tensor in tensors.values()) == model.size().bytes
    config = json.loads((folder / "config.json").read_text())
    assert "_class_name" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "compress"
    original = {key: value for key, value in model.config.items() if key != "_class_name"}
    assert {key: config[key] for key in original} == original


@pytest.mark.parametrize("format", ["compress", "dequantized"])
def test_what_chooses_code_is_not_exported(format, make_llm, quantize_all, tmp_path):
    source = make_llm("LlamaForCausalLM")
    config = json.loads((source / "config.json").read_text())
    kernel = {
        "attn_implementation": "a/b",
        "_attn_implementation": "a/b",
        "_attn_implementation_internal": "a/b",
    }
    code = {**kernel, "auto_map": {"AutoModelForCausalLM": "more.More"}}
    (source / "config.json").write_text(json.dumps({**config, **code, "more": 1}))
    model = open_model(ModelRef(id=str(source)), progress=SilentProgress())
    quantize_all(model)
    folder = tmp_path / "out"
    folder.mkdir()
    write(model, folder, format)
    written = json.loads((folder / "config.json").read_text())
    assert not code.keys() & written.keys() and written["more"] == 1
    assert torch.equal(_logits(_from_pretrained(folder)), _logits(as_shipped(model, format).module))


@pytest.mark.parametrize("stored", [0.0, 1.0])
def test_a_stored_head_is_the_embedding_where_the_config_says_so(stored, exported_llm):
    _, folder, _ = exported_llm(tie_word_embeddings=True)

    def add_a_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + stored

    _change(folder, add_a_head)
    if stored:
        with pytest.raises(SourceError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            compress.load(folder)
    else:
        module = compress.load(folder)
        assert module.lm_head.weight is module.model.embed_tokens.weight


@pytest.mark.parametrize("format", ["compress", "dequantized"])
@pytest.mark.parametrize("shard", [5_000_000_000, 4096])
def test_the_bytes_are_those_that_were_predicted(format, shard, exported_llm, tmp_path):
    model, _, _ = exported_llm(tie_word_embeddings=True)
    from compress.compressors.quantization.planning import planned_tensors
    from compress.compressors.quantization.scheme import Choice

    choices = [Choice(site, model.quantization.get(site.name), "test") for site in model.linears()]
    spec = model.spec.evolve(
        tensors=planned_tensors(model.spec, choices), quantization=dict(model.quantization)
    )
    folder = tmp_path / "again"
    folder.mkdir()
    info = write(model, folder, format, max_shard_size=shard)
    assert predict_bytes(spec, format, max_shard_size=shard) == info.bytes
    assert (folder / "model.safetensors.index.json").is_file() == (shard == 4096)
    assert torch.equal(_logits(_from_pretrained(folder)), _logits(as_shipped(model, format).module))
    assert torch.equal(_logits(compress.load(folder)), _logits(as_shipped(model, format).module))


def test_stock_transformers_stops_instead_of_guessing_until_compress_is_imported(exported_llm):
    _, folder, _ = exported_llm()
    # The other order, compress first, is how every run verifies its folder.
    program = (
        "import sys, transformers\n"
        f"load = lambda **o: transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, **o)\n"
        "for options in {}, {'ignore_mismatched_sizes': True}:\n"
        "    try:\n        load(**options)\n"
        "    except ValueError as error:\n        assert 'compress has to be imported' in str(error)\n"
        "    else:\n        sys.exit('it loaded')\n"
        "import compress\n"
        "print(type(load().model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantizedLinear"


def test_saved_by_the_library_its_guard_still_stops_stock_transformers(exported_llm, tmp_path):
    compress.load(exported_llm()[1]).save_pretrained(tmp_path / "saved")
    assert "transformers_weights" not in json.loads((tmp_path / "saved/config.json").read_text())
    program = (
        "import sys, transformers\n"
        f"try:\n    transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r})\n"
        "except RuntimeError as error:\n    assert 'ignore_mismatched_sizes' in str(error)\n"
        "else:\n    sys.exit('it loaded')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ask", ["update_attn_implementation", "update_tp_plan"])
def test_every_release_is_told_where_the_weights_are(ask, exported_llm):
    config = transformers.AutoConfig.from_pretrained(exported_llm()[1])
    assert config.transformers_weights
    from compress.runtime.transformers_quantizer import CompressConfig, CompressQuantizer

    quantizer = CompressQuantizer(CompressConfig(**config.quantization_config))
    for _ in range(2):  # some releases ask at both places
        config = getattr(quantizer, ask)(config)
        assert getattr(config, "transformers_weights", None) is None


@pytest.mark.parametrize("loader", [_from_pretrained, compress.load])
def test_another_name_of_the_weights_is_refused(loader, exported_llm):
    _, folder, _ = exported_llm()
    config = json.loads((folder / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"transformers_weights 'other\.safetensors' is not what compress"):
        loader(folder)


@pytest.mark.parametrize("loader", [_from_pretrained, compress.load])
def test_what_was_loaded_is_saved_and_loads_again(loader, exported_llm, tmp_path):
    model, folder, _ = exported_llm("Qwen2ForCausalLM", tie_word_embeddings=True)
    loader(folder).save_pretrained(tmp_path / "saved")
    for again in (_from_pretrained(tmp_path / "saved"), compress.load(tmp_path / "saved")):
        assert torch.equal(_logits(again), _logits(model.module))


def test_a_replaced_layer_is_not_saved(exported_llm, tmp_path):
    _, folder, _ = exported_llm()
    module = _from_pretrained(folder)
    module.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 80, bias=False)
    with pytest.raises(SourceError, match=r"layers\.0\.mlp\.up_proj is not the one that was loaded"):
        module.save_pretrained(tmp_path / "saved")


def test_another_dtype_leaves_the_grids_alone(exported_llm):
    _, folder, _ = exported_llm(dtype="float32")
    stock, ours = _from_pretrained(folder, dtype=torch.bfloat16), compress.load(folder, dtype="bfloat16")
    layer = stock.model.layers[0].self_attn.q_proj
    assert layer.scale.dtype == torch.float32 and stock.dtype == torch.bfloat16
    assert torch.equal(_logits(stock), _logits(ours))


def test_a_stage_starts_from_the_folder(exported_llm):
    model, folder, _ = exported_llm(tie_word_embeddings=True)
    module, manifest = read_checkpoint(folder)
    assert manifest.quantization == model.quantization
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(_logits(module), _logits(model.module))


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GUARD), "must be there with the length 0"),
        (lambda t: t.update({GUARD: torch.zeros(48, 80)}), "must be there with the length 0"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scale"), r"up_proj\.scale is missing"),
        (lambda t: t.update({"more": torch.zeros(2)}), "more is not"),
        (
            lambda t: t["model.layers.1.mlp.up_proj.scale"][3].fill_(torch.nan),
            r"up_proj\.scale holds nan \(1 of",
        ),
        (lambda t: t["model.layers.1.mlp.up_proj.scale"].neg_(), r"up_proj\.scale holds -.* not negative"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.scale": torch.zeros(80, 2)}),
            r"up_proj\.scale is F32 \[80, 2\]",
        ),
    ],
)
@pytest.mark.parametrize("loader", [_from_pretrained, compress.load])
def test_a_damaged_folder_is_refused(change, message, loader, exported_llm):
    _, folder, _ = exported_llm()
    _change(folder, change)
    with pytest.raises(SourceError, match=message):
        loader(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4000}, "num_hidden_layers 4000 with only"),
        ({"hidden_size": 2**21}, "hidden_size: 2097152 is out of range|not an integer from 1"),
        ({"architectures": ["NoSuchModel"]}, "does not belong to the scheme of its layer"),
        ({"architectures": None}, "no _class_name and no architectures"),
    ],
)
def test_a_config_that_was_changed_is_refused_before_it_is_built(changes, message, exported_llm):
    _, folder, _ = exported_llm()
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        compress.load(folder)


@pytest.mark.parametrize("format", ["torchao", "sdnq"])
def test_formats_of_diffusers_say_why_not(format, exported_llm, tmp_path):
    model, _, _ = exported_llm()
    for attempt in (lambda: predict_bytes(model.spec, format), lambda: write(model, tmp_path, format)):
        with pytest.raises(
            PlanError, match=f"{format} is written as the loader of diffusers reads it"
        ) as found:
            attempt()
        assert "dequantized" in str(found.value.hint)


def test_a_dense_folder_opens_with_its_defaults_for_generating(make_llm):
    folder = make_llm("LlamaForCausalLM", tie_word_embeddings=True)
    defaults = json.loads((folder / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    module = compress.load(folder)
    assert module.generation_config.max_new_tokens == 7
    assert torch.equal(_logits(module), _logits(_from_pretrained(folder)))
    for text, message in (
        ("{no json", "not JSON"),
        ("[" * 100_000, "levels deep"),
        ('{"a": ' * 500 + "1" + "}" * 500, "levels deep"),
        ('{"watermarking_config": {"a": 1}}', "transformers refuses it"),
    ):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(SourceError, match=rf"generation_config\.json: .*{message}"):
            compress.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="which compress does not write for models of transformers"):
        compress.load(folder)


@pytest.mark.parametrize(
    ("known", "found"), [({"a"}, {"a", "b"}), (set(), {"b"}), (["a"], ["a", "b"]), (None, ["b"])]
)
def test_names_to_ignore_keep_the_kind_that_a_release_has(known, found):
    """Releases of transformers 5 hold them as a set, or as a list or None, and add their own kind to them."""
    quantizer = import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING["compress"]
    assert import_module(quantizer.__module__)._with_expression(known, "b") == found
