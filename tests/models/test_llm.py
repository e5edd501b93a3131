"""Language models of transformers: shapes, structure, folds and work against the stock classes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from compress.errors import SourceError
from compress.models.checkpoint import locate
from compress.models.open import open_model, read_spec
from compress.models.registry import family_for, is_language_family
from compress.models.shapes import complete_config, expected_shapes
from compress.preflight import linear_names
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from compress.runtime.language_config import LANGUAGE_CLASSES, language_shape
from compress.runtime.transformers_config import implied_copies, stock_arguments
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CLASSES = sorted(LANGUAGE_CLASSES)
VARIANTS = [
    *((name, {}) for name in CLASSES),
    *((name, {"tie_word_embeddings": True}) for name in CLASSES),
    *((name, {"num_key_value_heads": 4}) for name in CLASSES),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "head_dim": 8}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("MistralForCausalLM", {"head_dim": 20}),
]


def _shown(value: object) -> str:
    return (
        value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in dict(value).items()) or "plain"
    )


@pytest.fixture
def opened(make_llm):
    def build(class_name, **config):
        return open_model(ModelRef(id=str(make_llm(class_name, **config))), progress=SilentProgress())

    return build


def _forward(model, batch=2):
    inputs = model.family.example_inputs(model.module, batch, torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model.module(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS, ids=_shown)
def test_shapes_are_those_of_the_stock_class(class_name, changes, llm_config):
    config = complete_config(class_name, llm_config(class_name, **changes), "config.json")
    with torch.device("meta"):
        module = family_for(class_name).build(config)
    stock = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert expected_shapes(class_name, config) == stock


@pytest.mark.parametrize("class_name", CLASSES)
def test_defaults_are_the_stock_classes(class_name):
    model_type, optional = LANGUAGE_CLASSES[class_name]
    stock = transformers.CONFIG_MAPPING[model_type]
    assert transformers.AutoConfig.for_model(model_type).__class__ is stock
    required = {
        "vocab_size": 40, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 32,
    }  # fmt: skip
    made, ours = stock(**required), language_shape({"_class_name": class_name, **required})
    assert ours.kv_heads == made.num_key_value_heads
    assert ours.positions == made.max_position_embeddings
    assert ours.tied == made.tie_word_embeddings
    assert ours.head_dim == (getattr(made, "head_dim", None) or 256 // 32)
    assert set(optional) >= {"num_key_value_heads", "head_dim", "tie_word_embeddings"}


@pytest.mark.parametrize("class_name", CLASSES)
def test_it_opens_as_the_stock_loader_does(class_name, make_llm):
    folder = make_llm(class_name, tie_word_embeddings=class_name.startswith("Qwen"))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(_forward(model), stock(**model.family.example_inputs(
            stock, 2, torch.Generator().manual_seed(7))).logits)  # fmt: skip
    assert inputs["input_ids"].shape == (2, 32) and inputs["use_cache"] is False  # 32 positions
    assert model.size() == read_spec(ModelRef(id=str(folder))).size()
    assert model.size().bytes == sum(p.numel() * 4 for p in stock.parameters())
    tied = model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert tied == class_name.startswith("Qwen") == bool(model.spec.shared)


def test_the_config_is_kept_to_the_letter(make_llm):
    folder = make_llm("LlamaForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    raw = json.loads((folder / "config.json").read_text()) | {"some_later_key": {"a": [1, None]}}
    (folder / "config.json").write_text(json.dumps(raw))
    model = open_model(ModelRef(id=str(folder)), progress=SilentProgress())
    assert model.config == {"_class_name": "LlamaForCausalLM", **raw}
    assert model.module.config.rope_parameters["rope_theta"] == 5e6


@pytest.mark.parametrize("class_name", CLASSES)
def test_linears_come_in_the_order_of_a_forward(class_name, opened):
    model = opened(class_name)
    order = []
    sites = model.linears()
    for site in sites:
        model.module.get_submodule(site.name).register_forward_pre_hook(
            lambda *_, name=site.name: order.append(name)
        )
    _forward(model, 1)
    assert [site.name for site in sites] == order
    linears = {
        n: tuple(m.weight.shape) for n, m in model.module.named_modules() if type(m) is torch.nn.Linear
    }
    assert {site.name: site.shape for site in sites} == linears
    assert [site.role for site in sites[:7]] == [
        "attention.q", "attention.k", "attention.v", "attention.out", "ff.gate", "ff.in", "ff.out",
    ]  # fmt: skip
    assert [site.block for site in sites] == [0] * 7 + [1] * 7 + [None]
    assert sites[-1].role == "head" and model.family.default_keep() == ("lm_head",)
    assert len(model.family.blocks(model.module)) == len(model.family.attentions(model.module)) == 2


def test_the_embedding_is_no_linear_layer(make_llm):
    names = linear_names(locate(ModelRef(id=str(make_llm("LlamaForCausalLM")))))
    assert "lm_head" in names and "model.embed_tokens" not in names and len(names) == 15


@pytest.mark.parametrize(("class_name", "changes"), VARIANTS, ids=_shown)
def test_folding_changes_no_output(class_name, changes, opened):
    model = opened(class_name, **changes)
    groups = model.family.folds(model.module)
    before = _forward(model).double()
    generator = torch.Generator().manual_seed(3)
    for group in groups:
        columns = model.module.get_submodule(group.targets[0]).weight.shape[1]
        factor = torch.empty(columns).uniform_(0.25, 4.0, generator=generator)
        group.absorb(model.module, factor)
        for name in group.targets:
            weight = model.module.get_submodule(name).weight
            with torch.no_grad():
                weight.copy_(weight / factor)
    after = _forward(model).double()
    assert (after - before).abs().max() / before.abs().max() < 1e-5
    own_values = language_shape(model.config).heads == language_shape(model.config).kv_heads
    assert len(groups) == 2 * (4 if own_values else 3)


@pytest.mark.parametrize("class_name", CLASSES)
def test_macs_are_those_that_torch_counts(class_name, opened):
    model = opened(class_name)
    inputs = model.family.example_inputs(model.module, 1, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.module(**inputs)
    assert counter.get_total_flops() == 2 * model.family.macs(model.config)
    shape = language_shape(model.config)
    products = 2 * shape.layers * 32 * 32 * shape.heads * shape.head_dim
    without = model.family.macs(model.config, attention_products=False)
    assert model.family.macs(model.config) - without == products


def test_the_reference_length_is_256_where_the_model_takes_more(opened):
    model = opened("LlamaForCausalLM", max_position_embeddings=600)
    assert model.family.example_inputs(model.module, 1, torch.Generator())["input_ids"].shape == (1, 256)


def test_a_tied_head_that_differs_is_refused(make_llm):
    from safetensors.torch import load_file, save_file

    folder = make_llm("LlamaForCausalLM", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(both, folder / "model.safetensors")
    assert open_model(ModelRef(id=str(folder)), progress=SilentProgress()).spec.shared
    both["lm_head.weight"][0, 0] += 1
    save_file(both, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"lm_head\.weight.*differs from .*embed_tokens"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["JambaForCausalLM"]}, "'JambaForCausalLM' is not supported"),
        ({"architectures": ["GraniteMoeForCausalLM"]}, "'GraniteMoeForCausalLM' is not supported"),
        ({"architectures": None}, "does not name"),
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not 'llama'"),
        ({"hidden_size": None}, "hidden_size: None is not an integer from 1"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers: 5000 is not an integer from 1 to 4096"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"head_dim": 3}, "head_dim 3 is not even"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes' is not true or false"),
        ({"pad_token_id": 60}, "pad_token_id: 60 is no id of a vocabulary of 60"),
        ({"pad_token_id": -61}, "pad_token_id: -61 is no id"),
        ({"pad_token_id": "0"}, "pad_token_id: '0' is no id"),
        ({"rope_parameters": {"factor": 1e30}}, r"rope_parameters 1e\+30 is out of range"),
        ({"intermediate_size": 40}, "the config implies"),
        ({"quantization_config": {"quant_method": "fp8"}}, "already quantized"),
    ],
)
def test_a_wrong_config_is_refused(changes, message, make_llm):
    folder = make_llm("LlamaForCausalLM")
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SourceError, match=message):
        locate(ModelRef(id=str(folder)))


def test_what_the_stock_class_refuses_is_an_error_about_the_source(make_llm):
    folder = make_llm("Qwen3ForCausalLM")
    raw = json.loads((folder / "config.json").read_text()) | {"layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(SourceError, match="Qwen3ForCausalLM refuses it"):
        open_model(ModelRef(id=str(folder)), progress=SilentProgress())


def test_nothing_of_a_config_chooses_code():
    config = {
        "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.py--X"}, "hidden_size": 64,
        "attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel",
    }  # fmt: skip
    assert stock_arguments(config) == {"hidden_size": 64, "model_type": "llama"}


@pytest.mark.parametrize("padding", [-1, 0, 59, None])
def test_an_id_of_padding_is_counted_as_stock_code_counts_it(padding, make_llm):
    folder = make_llm("LlamaForCausalLM")
    raw = json.loads((folder / "config.json").read_text()) | {"pad_token_id": padding}
    (folder / "config.json").write_text(json.dumps(raw))
    embedding = open_model(ModelRef(id=str(folder)), progress=SilentProgress()).module.model.embed_tokens
    assert embedding.padding_idx == (59 if padding == -1 else padding)


def test_only_language_models_have_implied_copies():
    assert implied_copies({"_class_name": "DiTTransformer2DModel", "tie_word_embeddings": True}) == {}
    assert is_language_family("llm") and not is_language_family("dit")
