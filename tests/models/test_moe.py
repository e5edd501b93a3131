"""Mixtures of experts of transformers: shapes, structure, work and names against the stock classes."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
import transformers
from compress.errors import SourceError
from compress.exporters import formats
from compress.models.checkpoint import locate
from compress.models.mixtures import mixtures
from compress.models.moe_shapes import active_parameters, expert_parameters, total_parameters
from compress.models.open import open_model, read_spec
from compress.models.registry import family_for, is_language_family
from compress.models.shapes import complete_config, expected_shapes
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.recipes.stages import STAGES
from compress.runtime.hashes import file_sha256
from compress.runtime.load import load
from compress.runtime.moe_classes import MOE_CLASSES
from compress.runtime.moe_config import moe_shape, with_expert_count
from compress.runtime.transformers_config import stock_arguments
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..tiny_moe import CLASSES, make_moe, moe_config, moe_module

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN15_A27B = {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
VARIANTS = [
    *((name, {}) for name in CLASSES),
    ("MixtralForCausalLM", {"head_dim": 12, "tie_word_embeddings": True}),
    ("Qwen2MoeForCausalLM", {"qkv_bias": False, "decoder_sparse_step": 2}),
    ("Qwen3MoeForCausalLM", {"attention_bias": True, "mlp_only_layers": [3]}),
    ("OlmoeForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    ("PhimoeForCausalLM", {"lm_head_bias": False, "attention_bias": False}),
    ("GptOssForCausalLM", {"attention_bias": False}),
    ("DeepseekV2ForCausalLM", {"q_lora_rank": 12, "mlp_bias": True, "attention_bias": True}),
    ("DeepseekV3ForCausalLM", {"q_lora_rank": None, "first_k_dense_replace": 0}),
]


def _open(folder):
    return open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def _logits(module, tokens=24, seed=7):
    ids = torch.randint(60, (2, tokens), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def _shown(value):
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()) or "plain"


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS, ids=_shown)
def test_shapes_are_those_of_the_stock_class(class_name, changes):
    config = complete_config(class_name, moe_config(class_name, **changes), "config.json")
    with torch.device("meta"):
        module = family_for(class_name).build(config)
    stock = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert expected_shapes(class_name, config) == stock
    assert total_parameters(config) == sum(parameter.numel() for parameter in module.parameters())
    assert [mixture.layer for mixture in mixtures(module)] == list(moe_shape(config).sparse)


@pytest.mark.parametrize("class_name", CLASSES)
def test_defaults_are_the_stock_classes(class_name):
    required = {
        "vocab_size": 40, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 32,
    }  # fmt: skip
    if class_name == "DeepseekV2ForCausalLM":
        required["num_experts_per_tok"] = 6  # the stock class has no default that routes
    config = complete_config(class_name, {"architectures": [class_name], **required}, "config.json")
    with torch.device("meta"):
        module = family_for(class_name).build(config)
    assert expected_shapes(class_name, config) == {n: tuple(t.shape) for n, t in module.state_dict().items()}
    shape, stock = moe_shape(config), module.config
    assert shape.positions == stock.max_position_embeddings and shape.tied == stock.tie_word_embeddings
    assert shape.routing.active == stock.num_experts_per_tok == mixtures(module)[0].active
    assert shape.routing.experts == mixtures(module)[0].count


def test_mixtral_8x7b_has_the_published_parameters():
    config = complete_config("MixtralForCausalLM", MIXTRAL_8X7B, "config.json")
    counts = {kept: total_parameters(with_expert_count(config, kept)) for kept in (8, 6, 4, 2)}
    assert {kept: round(count / 1e9, 3) for kept, count in counts.items()} == {
        8: 46.703, 6: 35.428, 4: 24.154, 2: 12.879
    }  # fmt: skip
    assert counts[4] == 24_153_690_112
    assert round(active_parameters(config) / 1e9, 3) == 12.880
    assert round(active_parameters(with_expert_count(config, 8, active=1)) / 1e9, 3) == 7.243
    assert round(32 * expert_parameters(moe_shape(config)) / 1e9, 3) == 5.637
    with torch.device("meta"):
        module = family_for("MixtralForCausalLM").build(with_expert_count(config, 4))
    assert sum(parameter.numel() for parameter in module.parameters()) == counts[4]


def test_qwen_15_moe_has_the_published_parameters():
    config = complete_config(
        "Qwen2MoeForCausalLM", {"architectures": ["Qwen2MoeForCausalLM"], **QWEN15_A27B}, "config.json"
    )
    counts = [total_parameters(with_expert_count(config, kept)) for kept in (60, 30, 15)]
    assert [round(count / 1e9, 3) for count in counts] == [14.316, 8.086, 4.971]


def test_a_plan_needs_the_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    spec = read_spec(ModelRef(id=str(tmp_path)))
    assert spec.parameters == total_parameters(spec.config)
    assert spec.size().bytes == 2 * spec.parameters and spec.dtype == torch.bfloat16
    assert spec.size().to_json()["active_parameters"] == active_parameters(spec.config)
    predicted = formats.predict_tensor_bytes(spec, "compress")
    assert predicted == 2 * spec.parameters < formats.predict_bytes(spec, "compress")


@pytest.mark.parametrize("hub_names", [True, False], ids=["hub", "fused"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_it_opens_as_the_stock_loader_does(class_name, hub_names, tmp_path):
    folder = make_moe(tmp_path / "m", class_name, hub_names=hub_names)
    model = _open(folder)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name
    assert torch.equal(_logits(model.module), _logits(stock))
    assert torch.equal(_logits(load(folder)), _logits(stock))
    assert model.size() == read_spec(ModelRef(id=str(folder))).size()
    assert model.family.name == "moe" and is_language_family("moe")
    assert model.size().parameters == sum(parameter.numel() for parameter in stock.parameters())
    assert model.size().bytes == sum(t.numel() * 4 for t in stock.state_dict().values())


@pytest.mark.parametrize("class_name", CLASSES)
def test_what_is_written_has_the_names_of_the_hub_and_loads_with_transformers(class_name, tmp_path):
    folder = make_moe(tmp_path / "m", class_name, dtype="bfloat16")
    model = _open(make_moe(tmp_path / "fused", class_name, dtype="bfloat16", hub_names=False))
    out = tmp_path / "out"
    out.mkdir()
    info = formats.write(model, out, "compress")
    wanted = {path: tensor.shape for path, tensor in load_file(folder / "model.safetensors").items()}
    written = load_file(out / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == wanted
    stock, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(_logits(stock.eval()), _logits(model.module))
    assert torch.equal(_logits(load(out)), _logits(model.module))
    assert formats.predict_bytes(model.spec, "compress") == info.bytes
    corrections = [t for name, t in written.items() if name.endswith("e_score_correction_bias")]
    assert all(t.dtype == torch.float32 for t in corrections)
    assert bool(corrections) == (class_name == "DeepseekV3ForCausalLM")


@pytest.mark.parametrize("class_name", ["PhimoeForCausalLM", "GptOssForCausalLM"])
def test_an_export_without_quantization_is_the_same_in_the_dequantized_format(class_name, tmp_path):
    model = _open(make_moe(tmp_path / "m", class_name))
    out = tmp_path / "out"
    out.mkdir()
    info = formats.write(model, out, "dequantized")
    stock, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(_logits(stock.eval()), _logits(model.module))
    assert formats.predict_bytes(model.spec, "dequantized") == info.bytes
    other = tmp_path / "other"
    other.mkdir()
    formats.write(model, other, "compress")
    assert (other / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("class_name", CLASSES)
def test_macs_are_those_that_torch_counts(class_name, tmp_path):
    module = moe_module(class_name)
    module.set_experts_implementation("eager")
    module.config._attn_implementation = "eager"
    config = complete_config(class_name, moe_config(class_name), "config.json")
    family = family_for(class_name)
    inputs = family.example_inputs(module, 1, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        module(**inputs)
    assert counter.get_total_flops() == 2 * family.macs(config)
    shape = moe_shape(config)
    assert family.macs(config, attention_products=False) < family.macs(config)
    fewer = with_expert_count(config, shape.routing.experts, active=1)
    saved = 32 * len(shape.sparse) * 3 * shape.width * shape.expert_inner
    assert family.macs(config) - family.macs(fewer) == saved


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_linear_has_a_role_and_comes_in_forward_order(class_name):
    module, family = moe_module(class_name), family_for(class_name)
    sites, order = family.linears(module), []
    for site in sites:
        module.get_submodule(site.name).register_forward_pre_hook(
            lambda *_, name=site.name: order.append(name)
        )
    _logits(module)
    linears = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {site.name for site in sites} == linears == set(order)
    assert sites[-1].role == "head"
    blocks = [site.block for site in sites[:-1]]
    assert blocks == sorted(blocks) and len(family.blocks(module)) == module.config.num_hidden_layers


@pytest.mark.parametrize("class_name", CLASSES)
def test_mixtures_are_found_with_every_tensor_that_has_a_slice_per_expert(class_name):
    module = moe_module(class_name)
    found = mixtures(module)
    names = set()
    for mixture in found:
        assert (mixture.count, mixture.active) == (module.config.num_experts if hasattr(
            module.config, "num_experts") else module.config.num_local_experts, 2)  # fmt: skip
        for place, tensors in (
            (f"{mixture.name}.{mixture.router_name}", mixture.router_tensors()),
            (f"{mixture.name}.experts", mixture.expert_tensors()),
        ):
            assert all(tensor.shape[0] == mixture.count for tensor in tensors.values())
            names |= {f"{place}.{name}" for name in tensors}
    expected = {
        name for name in module.state_dict()
        if ".experts." in name or ".mlp.router." in name or ".mlp.gate." in name
    }  # fmt: skip
    assert names == expected and len(found) == len(moe_shape(complete_config(
        class_name, moe_config(class_name), "config.json")).sparse)  # fmt: skip
    assert prod(found[0].expert_tensors()["down_proj"].shape[1:]) == 24 * 32


@pytest.mark.parametrize(
    "keys", [("num_experts",), ("num_local_experts",), ("num_experts", "num_local_experts")]
)
def test_both_keys_of_qwen3_say_the_number_of_experts(keys):
    config = moe_config("Qwen3MoeForCausalLM")
    del config["num_experts"]
    full = complete_config("Qwen3MoeForCausalLM", {**config, **dict.fromkeys(keys, 5)}, "config.json")
    assert moe_shape(full).routing.experts == 5
    fewer = with_expert_count(full, 3)
    assert fewer["num_experts"] == fewer["num_local_experts"] == 3
    built = transformers.AutoConfig.for_model(**stock_arguments(fewer))
    assert built.num_experts == 3


@pytest.mark.parametrize(
    ("class_name", "changes", "message"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 7}, "7 experts per token, of 6 experts"),
        ("MixtralForCausalLM", {"num_experts_per_tok": None}, "num_experts_per_tok: None is not an integer"),
        ("MixtralForCausalLM", {"num_local_experts": 0}, "num_local_experts: 0 is not an integer from 1"),
        ("MixtralForCausalLM", {"num_experts": 4}, "num_local_experts 6, num_experts 4 are to say the same"),
        ("MixtralForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
        ("GptOssForCausalLM", {"quantization_config": {"quant_method": "mxfp4"}}, "already quantized"),
        ("PhimoeForCausalLM", {"num_experts_per_tok": 1}, "this kind of router picks 2"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux"}, "topk_method: 'noaux' is not one of greedy"),
        ("DeepseekV3ForCausalLM", {"n_group": 3}, "8 experts do not stand in 3 groups"),
        ("DeepseekV3ForCausalLM", {"n_group": 8}, "1 expert in each of 8 groups; the router needs 2"),
        ("DeepseekV3ForCausalLM", {"topk_group": 3}, "topk_group 3 of n_group 2 groups"),
        (
            "DeepseekV3ForCausalLM",
            {"num_experts_per_tok": 5},
            "of the 4 in the 1 groups that a token may use",
        ),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": 1}, "mlp_only_layers: 1 is not a list of layers"),
        ("Qwen2MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not an integer"),
        ("GptOssForCausalLM", {"head_dim": 7}, "7 channels of a head are not even"),
        ("OlmoeForCausalLM", {"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes' is not true or false"),
        ("OlmoeForCausalLM", {"intermediate_size": 23}, "the config implies"),
    ],
)
def test_a_wrong_config_is_refused(class_name, changes, message, tmp_path):
    folder = make_moe(tmp_path / "m", class_name)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SourceError, match=message):
        locate(ModelRef(id=str(folder)))


def _rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize("method", ["mxfp4", "bitsandbytes"])
def test_quantized_experts_are_refused_with_the_way_out(method, tmp_path):
    config = moe_config("GptOssForCausalLM", quantization_config={"quant_method": method})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="already quantized") as caught:
        read_spec(ModelRef(id=str(tmp_path)))  # there are no weights that could be read
    assert "rows of quantized experts cannot be mixed" in caught.value.hint
    assert "dequantize=True" in caught.value.hint


def test_every_quantizer_of_language_models_fits_the_family():
    for stage in STAGES.values():
        if stage.phase == "quantize":
            assert ("moe" in stage.families) == ("llm" in stage.families)


def test_a_missing_expert_is_named(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    _rewrite(folder, lambda tensors: tensors.pop(W1))
    for read in (lambda: locate(ModelRef(id=str(folder))), lambda: load(folder)):
        with pytest.raises(SourceError, match=r"layers\.1\.mlp\.experts\.3\.gate_proj.* missing"):
            read()


def test_an_expert_of_another_shape_is_named(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    _rewrite(folder, lambda tensors: tensors.update({W1: tensors[W1][:20].clone()}))
    for read in (lambda: locate(ModelRef(id=str(folder))), lambda: load(folder)):
        with pytest.raises(SourceError, match=r"experts\.3\.gate_proj.*\[20, 32\]"):
            read()


def test_an_expert_too_many_is_refused(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    extra = W1.replace("experts.3", "experts.6")
    _rewrite(folder, lambda tensors: tensors.update({extra: tensors[W1].clone()}))
    for read in (lambda: locate(ModelRef(id=str(folder))), lambda: load(folder)):
        with pytest.raises(SourceError, match=r"experts\.6\.gate_proj.*(unknown|unexpected|not in)"):
            read()


def test_experts_stored_twice_are_refused(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    whole = "model.layers.1.mlp.experts.gate_up_proj"
    _rewrite(folder, lambda tensors: tensors.update({whole: torch.zeros(6, 48, 32)}))
    with pytest.raises(SourceError, match="stored as a whole, and expert by expert"):
        locate(ModelRef(id=str(folder)))


def test_a_part_that_is_not_finite_is_named(tmp_path):
    folder = make_moe(tmp_path / "m", "MixtralForCausalLM")
    _rewrite(folder, lambda tensors: tensors[W1].fill_(float("nan")))
    with pytest.raises(SourceError, match=r"experts\.3\.gate_proj.*NaN or Inf"):
        _open(folder)


def test_the_layer_that_the_stock_class_skips_is_skipped(tmp_path):
    folder = make_moe(tmp_path / "m", "DeepseekV3ForCausalLM")
    before = _logits(_open(folder).module)
    extra = {"model.layers.61.eh_proj.weight": torch.ones(4, 4)}
    _rewrite(folder, lambda tensors: tensors.update(extra))
    model = _open(folder)
    assert torch.equal(_logits(model.module), before)
    assert model.source.hashes == {"model.safetensors": file_sha256(folder / "model.safetensors")}


def test_the_former_name_of_phimoe_is_known(tmp_path):
    folder = make_moe(tmp_path / "m", "PhimoeForCausalLM")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": ["PhiMoEForCausalLM"], "auto_map": {"AutoConfig": "x.py--X"}}
    (folder / "config.json").write_text(json.dumps(raw))
    model = _open(folder)
    assert model.config["_class_name"] == "PhimoeForCausalLM" and set(MOE_CLASSES) >= {"PhimoeForCausalLM"}
