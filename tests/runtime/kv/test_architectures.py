"""Every architecture that is supported: at full rank, the compressed cache decodes as the stock one does."""

from __future__ import annotations

import copy

import pytest
import torch
from compress.errors import PlanError, SourceError
from compress.runtime.kv.attach import factors_of, new_cache, put_kv_cache
from compress.runtime.kv.sizes import PlainLayer, cache_bytes
from compress.runtime.kv.support import layers_of, unsupported
from transformers import AutoConfig, DynamicCache

from ...tiny_moe import moe_module
from .tiny import compressed, scheme_for

DENSE = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
MOE = [
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "PhimoeForCausalLM",
]
MOE += ["GptOssForCausalLM"]
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


@pytest.fixture
def dense(llm_config):
    """Return `dense(class_name, seed=0, **changes)` -> a tiny stock module with random weights and biases."""
    import transformers

    def make(class_name, seed=0, **changes):
        changes = {"sliding_window": None, **changes} if class_name.startswith("Mistral") else changes
        keys = llm_config(class_name, **changes)
        keys.pop("architectures")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = getattr(transformers, class_name)(AutoConfig.for_model(**keys))
            for parameter in module.parameters():
                if parameter.ndim == 1:
                    parameter.data.uniform_(0.5, 1.5)
                else:
                    parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5)
        return module.eval()

    return make


def _ids(tokens=22):
    return torch.randint(3, 60, (2, tokens), generator=torch.Generator().manual_seed(0))


def _decoded(module, cache, ids, prompt=9):
    """Logits of a prompt and of the steps after it."""
    with torch.no_grad():
        found = [module(ids[:, :prompt], past_key_values=cache).logits]
        for index in range(prompt, ids.shape[1]):
            found.append(module(ids[:, index : index + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1)


def _assert_full_rank_is_exact(module, **settings):
    expected = _decoded(module, DynamicCache(config=module.config), _ids())
    module = compressed(module, 0, 0, window=2, **settings)
    cache = new_cache(module)
    found = _decoded(module, cache, _ids())
    assert torch.equal(found[:, :9], expected[:, :9])
    assert (found - expected).abs().max() < 2e-4
    for factors in factors_of(module).values():
        factors.k_b.weight.data.neg_()
    assert (_decoded(module, new_cache(module), _ids()) - expected).abs().max() > 1e-2, "keys are rebuilt"
    for factors in factors_of(module).values():
        factors.k_b.weight.data.neg_()
        factors.v_b.weight.data.neg_()
    assert (_decoded(module, new_cache(module), _ids()) - expected).abs().max() > 1e-2, "values are rebuilt"


@pytest.mark.parametrize("class_name", DENSE)
def test_dense_models_at_full_rank(dense, class_name):
    _assert_full_rank_is_exact(dense(class_name))


@pytest.mark.parametrize("class_name", MOE)
def test_mixtures_of_experts_at_full_rank(class_name):
    _assert_full_rank_is_exact(moe_module(class_name))


def test_biases_and_clips(dense):
    _assert_full_rank_is_exact(dense("LlamaForCausalLM", attention_bias=True))
    _assert_full_rank_is_exact(moe_module("OlmoeForCausalLM", attention_bias=True, clip_qkv=0.5))


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rotary_positions_that_are_scaled(dense, kind):
    module = dense("LlamaForCausalLM", rope_parameters={"rope_theta": 10000.0, **ROPE[kind]})
    assert kind != "yarn" or module.model.rotary_emb.attention_scaling > 1.1
    _assert_full_rank_is_exact(module)


def test_eager_attention(dense):
    module = dense("LlamaForCausalLM")
    module.set_attn_implementation("eager")
    _assert_full_rank_is_exact(module)


def test_layers_with_a_sliding_window_keep_their_stock_cache(dense):
    module = dense(
        "Qwen2ForCausalLM",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    )
    expected = _decoded(module, DynamicCache(config=module.config), _ids())
    assert list(scheme_for(module).layers) == ["model.layers.0.self_attn"]
    compressed(module, 0, 0, window=2)
    cache = new_cache(module)
    assert (_decoded(module, cache, _ids()) - expected).abs().max() < 2e-4
    plain = [PlainLayer(24, 5)] * 2
    assert cache.stored_bytes() == cache_bytes(scheme_for(module, 0, 0, window=2), 22, 2, 4, plain)


def test_a_scheme_that_lists_a_layer_with_a_sliding_window_is_refused(dense):
    sizes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    everything = scheme_for(dense("Qwen2ForCausalLM"))
    with pytest.raises(SourceError, match=r"model\.layers\.1\.self_attn attends to a sliding window"):
        put_kv_cache(dense("Qwen2ForCausalLM", **sizes), everything)


def test_a_layer_that_is_not_listed_keeps_a_stock_cache(dense):
    module = dense("LlamaForCausalLM", num_hidden_layers=3)
    expected = _decoded(copy.deepcopy(module), DynamicCache(), _ids())
    scheme = scheme_for(module, 2, 2, window=2)
    listed = scheme.model_copy(update={"layers": dict(list(scheme.layers.items())[1:2])})
    put_kv_cache(module, listed)
    cache = new_cache(module)
    assert (_decoded(module, cache, _ids()) - expected).abs().max() > 1e-3
    assert cache.stored_bytes() == cache_bytes(listed, 22, 2, 4, [PlainLayer(24)] * 2)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_change_are_refused(dense, llm_config, kind):
    config = llm_config("LlamaForCausalLM", rope_scaling={"type": kind, "factor": 4.0})
    assert "frequencies change" in unsupported(config)
    if kind == "dynamic":
        module = dense("LlamaForCausalLM", rope_parameters={"rope_theta": 1e4, **ROPE[kind]})
        steady = scheme_for(dense("LlamaForCausalLM"))
        with pytest.raises(PlanError, match="frequencies change"):
            put_kv_cache(module, steady)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is none"),
        ({"architectures": ["DiTTransformer2DModel"]}, "causal language model"),
        ({"num_kv_shared_layers": 2}, "share keys and values"),
        ({"partial_rotary_factor": 0.5}, "a part of a head's channels"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "a part of a head's"),
    ],
)
def test_what_is_not_supported_says_why(llm_config, config, reason):
    assert reason in unsupported(llm_config("LlamaForCausalLM", **config))


@pytest.mark.parametrize("class_name", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_latent_attention_is_refused(class_name, dense):
    module = moe_module(class_name)
    with pytest.raises(PlanError, match=r"multi-head latent \(MLA\)"):
        put_kv_cache(module, scheme_for(dense("LlamaForCausalLM")))


def test_a_window_over_all_layers_is_refused(llm_config):
    assert "all its layers" in unsupported(llm_config("MistralForCausalLM", sliding_window=16))
    assert "all its layers" in unsupported(llm_config("MistralForCausalLM")), "4096 is the stock default"


WINDOWS = [
    ("LlamaForCausalLM", {}), ("LlamaForCausalLM", {"sliding_window": 8}),
    ("MistralForCausalLM", {}), ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 7}),
    *[
        (f"{name}ForCausalLM", changes)
        for name in ("Qwen2", "Qwen3", "Qwen2Moe", "Qwen3Moe")
        for changes in (
            {}, {"sliding_window": 8}, {"use_sliding_window": True},
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            {"use_sliding_window": True, "sliding_window": None},
        )
        if (name, changes.get("sliding_window", 1)) != ("Qwen2Moe", None)  # stock code fails on it
    ],
    *[
        (f"{name}ForCausalLM", {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds})
        for name in ("Qwen2", "Qwen3", "Qwen2Moe", "GptOss")
        for kinds in (["sliding_attention", "full_attention", "full_attention", "sliding_attention"],)
    ],
    ("MixtralForCausalLM", {}), ("MixtralForCausalLM", {"sliding_window": 8}),
    ("PhimoeForCausalLM", {}), ("PhimoeForCausalLM", {"sliding_window": 8}),
    ("GptOssForCausalLM", {}), ("GptOssForCausalLM", {"sliding_window": 8}),
    ("OlmoeForCausalLM", {}),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "changes"), WINDOWS)
def test_layers_slide_where_the_stock_cache_slides(llm_config, class_name, changes):
    """A config as it stands on disk is understood as the stock class and its cache understand it."""
    from ...tiny_moe import moe_config

    make = llm_config if class_name in DENSE else moe_config
    config = make(class_name, **{"num_hidden_layers": 4, **changes})
    stock = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    expected = [getattr(layer, "is_sliding", False) for layer in DynamicCache(config=stock).layers]
    found = layers_of(config)
    names = [f"model.layers.{index}.self_attn" for index, slides in enumerate(expected) if not slides]
    assert [attention.name for attention in found.compressible] == names
    assert [skipped.sliding_window for skipped in found.skipped] == [
        getattr(stock, "sliding_window", None)
    ] * sum(expected)
    assert layers_of({**stock.to_dict(), "_class_name": class_name}) == found
