"""What the plan says from configs alone: the published figures, refusals, and what is left as it is."""

from __future__ import annotations

import json

import pytest
from compress.compressors.kv_cache.cskv import Cskv
from compress.compressors.kv_cache.planning import attentions_of, peak_bytes
from compress.compressors.kv_cache.ranks import scheme_of, uniform_ranks
from compress.errors import PlanError
from compress.models.cache_bytes import context_length
from compress.models.open import read_spec
from compress.recipes.schema import ModelRef

from ...tiny_moe import moe_config
from .conftest import settings

BOTH_80 = {"removed": {"k": 0.8, "v": 0.8}}
LONGCHAT = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
    "max_position_embeddings": 32768, "rope_scaling": {"factor": 8.0, "type": "linear"},
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32,
    "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None,
}  # fmt: skip


@pytest.fixture
def spec_of(tmp_path):
    """Return `spec_of(config)` -> the spec of a folder that holds a config and nothing else."""

    def make(config, dtype="bfloat16"):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_spec(ModelRef.model_validate({"id": str(tmp_path), "dtype": dtype}))

    return make


def planned(spec, **keys):
    return Cskv().plan(spec, settings(**keys))


@pytest.mark.parametrize(
    ("config", "full", "at_50", "at_80", "factor_gb_50", "factor_gb_80", "break_even"),
    [
        (LONGCHAT, 524_288, 262_144, 102_400, 2.15, 0.84, 1_989),
        (MISTRAL, 131_072, 65_536, 25_600, 0.34, 0.13, 1_243),
    ],
    ids=["longchat", "mistral"],
)
def test_published_sizes(spec_of, config, full, at_50, at_80, factor_gb_50, factor_gb_80, break_even):
    """At 80 % the table counts 25 of a head's 128 channels, int(0.2 * 128): 80.47 % are removed."""
    spec = spec_of(config)
    for removed, bytes_per_token, factor_gb in ((0.5, at_50, factor_gb_50), (0.8, at_80, factor_gb_80)):
        plan = planned(spec, removed={"k": removed, "v": removed})
        assert plan.before.kv_bytes_per_token == full
        assert plan.after.kv_bytes_per_token == bytes_per_token
        assert (plan.after.bytes - plan.before.bytes) / 1e9 == pytest.approx(factor_gb, abs=0.005)
        assert plan.after.parameters == plan.before.parameters
        assert set(plan.spec.tensors) >= set(spec.tensors)
    text = "\n".join(plan.notes)
    assert "(80.47 % removed), of values" in text
    assert f"cache: {full:,} -> {at_80:,} bytes per token (80.47 % less)" in text
    assert f"alone, over all sequences together, from {break_even:,} cached tokens on" in text


def test_longchat_says_what_reading_and_the_window_cost(spec_of):
    text = "\n".join(planned(spec_of(LONGCHAT), **BOTH_80).notes)
    assert "16,777,216 bytes per sequence for the window of 32" in text  # 32 layers * 2 * 4096 * 32 * 2
    # 32,768 tokens of 102,400 bytes and 4 of their position; 838,860,800 of factors.
    assert (
        "one sequence of 32,768 tokens, the model's context: 17,179,869,184 -> 3,372,351,488 bytes of cache,"
        " window counted (19.63 %); 4,211,212,288 with the factors (24.51 %)" in text
    )
    assert "with the window they pay off from 2,029 cached tokens of one sequence on; alone" in text
    assert "costs 13.7 TFLOP per decoded token at 32,768 cached tokens" in text


def test_bits_are_told_with_what_lies_beside_them(spec_of):
    plan = planned(spec_of(LONGCHAT), bits=4, **BOTH_80)
    # A layer's token: 800 keys of 4 + 32 / 32 bits, 800 values in 400 bytes and 32 scales of 4 bytes.
    stored = 32 * (800 * 5 // 8 + 400 + 32 * 4)
    assert plan.after.kv_bytes_per_token == stored == 32_896
    text = "\n".join(plan.notes)
    assert "4 bits, packed: 7,296 of the 32,896 bytes of a compressed token are scales and offsets" in text
    assert "with them 93.73 % of these layers' cache are saved" in text


def test_a_number_is_planned_with_more_of_the_values(spec_of):
    plan = planned(spec_of(MISTRAL), removed=0.8)
    assert {(row["rank_k"], row["rank_v"]) for row in plan.layers} == {(8 * 19, 8 * 32)}
    assert plan.after.kv_bytes_per_token == 32 * 2 * 8 * 51
    assert "80.08 % of both are removed, in 32 attentions" in "\n".join(plan.notes)


def test_ranks_by_layer_are_planned_by_their_sum(spec_of):
    equal, dealt = (planned(spec_of(MISTRAL), allocate=how, **BOTH_80) for how in ("uniform", "energy"))
    assert dealt.after == equal.after
    assert "how many stay in which of 32 attentions is decided on calibration data" in "\n".join(dealt.notes)


def test_layers_with_a_sliding_window_keep_their_cache(spec_of, llm_config):
    config = llm_config(
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=16,
        max_window_layers=1,
        num_hidden_layers=5,
    )
    plan = planned(spec_of(config), removed=0.5)
    assert [row["name"] for row in plan.layers] == ["model.layers.0.self_attn"]
    (note,) = (note for note in plan.notes if note.startswith("keep a plain cache"))
    assert "last 16 tokens" in note
    assert note.endswith("model.layers.3.self_attn and 1 more")
    full = 2 * 24 * 2
    assert plan.after.kv_bytes_per_token == 4 * full + 2 * (8 + 14)  # 4 of 12 channels, 7 of 12, two heads


def test_mixtures_of_experts_have_caches_too(spec_of):
    plan = planned(spec_of(moe_config("MixtralForCausalLM", sliding_window=None)), removed=0.5)
    assert len(plan.layers) == 3
    assert plan.after.kv_bytes_per_token < plan.before.kv_bytes_per_token


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (moe_config("DeepseekV3ForCausalLM"), r"multi-head latent \(MLA\)"),
        (
            {**LONGCHAT, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rotary positions are of type 'dynamic'",
        ),
        ({**MISTRAL, "sliding_window": 4096}, "sliding window"),
    ],
    ids=["mla", "dynamic", "all slide"],
)
def test_models_that_cannot_are_refused_with_the_reason(spec_of, config, message):
    with pytest.raises(PlanError, match=message) as caught:
        planned(spec_of(config))
    assert caught.value.message.startswith("the cache of this model cannot be compressed: ")


def test_a_cache_is_compressed_once(spec_of):
    once = planned(spec_of(MISTRAL)).spec
    with pytest.raises(PlanError, match="is compressed already"):
        planned(once)


def test_a_share_that_leaves_nothing_names_the_layer(spec_of):
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn: removing 0\.995 of the keys"):
        planned(spec_of(MISTRAL), removed={"k": 0.995, "v": 0.8})


def test_training_is_told_and_takes_memory_and_disk(spec_of):
    spec = spec_of(MISTRAL)
    plain = planned(spec, **BOTH_80)
    trained = planned(spec, steps=200, init="asvd", **BOTH_80)
    factors = 32 * (4096 + 1024) * (200 + 200)
    state = 25 * 4 * (3 * factors // 32 + 1024 * 4096)  # 25 attentions are trained side by side
    assert (plain.disk_bytes, trained.disk_bytes) == (0, 4 * factors + 2 * state)
    assert trained.peak_memory_bytes > plain.peak_memory_bytes
    assert (
        "training: 200 steps of 1,024 tokens for the factors of every attention, on its own error"
        in trained.notes
    )
    pointless = planned(spec, steps=200, **BOTH_80)
    assert any("is the optimum of what is trained for already" in note for note in pointless.notes)
    rounded = planned(spec, steps=200, bits=4, **BOTH_80)
    assert any(note.endswith("through the rounding of the cache") for note in rounded.notes)
    assert not any("is the optimum" in note for note in rounded.notes)


def test_memory_holds_a_portion_of_the_second_moments(spec_of):
    spec = spec_of(LONGCHAT)
    attention = attentions_of(spec.config).compressible
    found = settings(**BOTH_80)
    scheme = scheme_of(attention, uniform_ranks(attention, found), found)
    factors = 4 * 32 * 8192 * 1600
    peak = peak_bytes(attention, scheme, found)
    assert 2 * 2**30 + factors < peak < 2 * 2**30 + factors + 2 * 2**30
    few = peak_bytes(
        attention[:4], scheme_of(attention[:4], uniform_ranks(attention[:4], found), found), found
    )
    assert 4 * 8 * 4096**2 < few < 2 * 2**30 + 2**29


def test_context_lengths():
    assert context_length({**LONGCHAT, "_class_name": "LlamaForCausalLM"}) == 32768
    assert context_length({**moe_config("MixtralForCausalLM"), "_class_name": "MixtralForCausalLM"}) == 32
