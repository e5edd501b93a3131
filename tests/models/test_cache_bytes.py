"""Bytes of a token in the cache: the published sizes, compressed and not, from configs alone."""

from __future__ import annotations

import pytest
from compress.models.cache_bytes import kv_bytes_per_token
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer

from ..runtime.kv.tiny import PUBLISHED
from ..tiny_moe import moe_config

LONGCHAT = {
    "_class_name": "LlamaForCausalLM", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
MISTRAL = {**LONGCHAT, "_class_name": "MistralForCausalLM", "num_key_value_heads": 8}


def scheme(width, rank, layers=range(32), **changes):
    layer = KvLayer(hidden=4096, width=width, rank_k=rank, rank_v=rank, value_group=32)
    names = [f"model.layers.{i}.self_attn" for i in layers]
    return KvCacheScheme(layers=dict.fromkeys(names, layer), **{**PUBLISHED, **changes})


@pytest.mark.parametrize(
    ("config", "width", "full", "half", "fifth"),
    [(LONGCHAT, 4096, 524_288, 262_144, 102_400), (MISTRAL, 1024, 131_072, 65_536, 25_600)],
)
def test_the_sizes_that_follow_from_the_paper(config, width, full, half, fifth):
    """arXiv 2409.10593: 64 and 25 of the 128 channels of a head are left at 50 and 80 %."""
    assert kv_bytes_per_token(config, 2) == full
    assert kv_bytes_per_token(config, 2, scheme(width, width // 2)) == half
    assert kv_bytes_per_token(config, 2, scheme(width, width // 128 * 25)) == fifth


def test_layers_that_are_not_compressed_count_in_full():
    assert kv_bytes_per_token(MISTRAL, 2, scheme(1024, 200, range(8))) == 131_072 * 3 / 4 + 25_600 / 4


def test_scales_are_counted():
    packed = scheme(1024, 256, bits=4)
    # Half a byte per number; 4 bytes per 32 tokens of a key's channel, and per 32 channels of a value.
    assert kv_bytes_per_token(MISTRAL, 2, packed) == 32 * (256 + 4 * 256 / 32 + 4 * 256 / 32)


def test_mixtures_of_experts_and_narrow_vectors():
    config = {"_class_name": "MixtralForCausalLM", **moe_config("MixtralForCausalLM")}
    assert kv_bytes_per_token(config, 4) == 2 * 3 * 2 * 8 * 4
    for name in ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"):
        assert kv_bytes_per_token({"_class_name": name, **moe_config(name)}, 4) is None
