"""The bytes of a compressed cache: the published figures, and cases worked by hand."""

from __future__ import annotations

import pytest
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer
from compress.runtime.kv.sizes import (
    PlainLayer,
    break_even_tokens,
    break_even_tokens_one,
    bytes_per_token,
    cache_bytes,
    factor_parameters,
    full_bytes_per_token,
    full_cache_bytes,
    metadata_bytes_per_token,
    rebuild_flops,
    window_bytes,
)

from .tiny import PUBLISHED


def _scheme(layers, hidden, width, rank, group=25, **settings):
    layer = KvLayer(hidden=hidden, width=width, rank_k=rank, rank_v=rank, value_group=group)
    names = [f"model.layers.{i}.self_attn" for i in range(layers)]
    return KvCacheScheme(layers=dict.fromkeys(names, layer), **{**PUBLISHED, **settings})


LONGCHAT = {"layers": 32, "hidden": 4096, "width": 4096, "rank": 32 * 25}
MISTRAL = {"layers": 32, "hidden": 4096, "width": 1024, "rank": 8 * 25}


@pytest.mark.parametrize(
    ("model", "full", "compressed", "factor_gigabytes", "break_even"),
    [(LONGCHAT, 524_288, 102_400, 0.84, 1989), (MISTRAL, 131_072, 25_600, 0.13, 1243)],
)
def test_published_figures_at_80_percent(model, full, compressed, factor_gigabytes, break_even):
    scheme = _scheme(**model)
    assert full_bytes_per_token(scheme, 2) == full
    assert bytes_per_token(scheme, 2) == compressed
    assert factor_parameters(scheme) * 2 / 1e9 == pytest.approx(factor_gigabytes, abs=0.005)
    assert break_even_tokens(scheme, 2) == break_even
    assert metadata_bytes_per_token(scheme) == 0


def test_longchat_in_full():
    scheme = _scheme(**LONGCHAT, window=32)
    assert rebuild_flops(scheme, 32_768) == pytest.approx(13.7e12, rel=0.01)
    assert window_bytes(scheme, 2) == 32 * 524_288
    assert cache_bytes(scheme, 32_768, 1, 2) / 2**30 == pytest.approx(3.14, abs=0.005)


def test_bits_of_a_number_with_its_grid():
    """4 bits are 5.0 with the grid of 32 tokens of a key, and 5.28 with that of 25 channels of a value."""
    scheme = _scheme(**LONGCHAT, bits=4)
    numbers = 32 * 800
    expected = (5.0 + 4 + 32 / 25) / 8 * numbers
    assert bytes_per_token(scheme, 2) == pytest.approx(expected)
    assert metadata_bytes_per_token(scheme) == pytest.approx((1.0 + 32 / 25) / 8 * numbers)
    assert 1 - bytes_per_token(scheme, 2) / full_bytes_per_token(scheme, 2) == pytest.approx(
        0.937, abs=0.0005
    )


def test_a_quantized_cache_by_hand():
    """Rank 5 of 8, groups of 4 tokens and of 3 channels, 10 tokens: two groups packed, two tokens not."""
    scheme = _scheme(1, 16, 8, 5, 3, window=3, bits=4, key_group=4)
    keys, values = 2 * 5 * (2 + 4), 8 * (3 + 2 * 4)
    assert cache_bytes(scheme, 10, 1, 2) == keys + values + 2 * 10 * 2 + 2 * 8 * 3 * 2 + 10 * 4
    assert cache_bytes(scheme, 10, 3, 2) == 3 * cache_bytes(scheme, 10, 1, 2)
    assert cache_bytes(scheme, 3, 1, 2) == 3 * 10 * 2 + 2 * 8 * 3 * 2 + 3 * 4


def test_the_exact_tokens_of_a_block():
    scheme = _scheme(1, 16, 8, 4, window=4, mode="block")
    sizes = [cache_bytes(scheme, tokens, 1, 2) - tokens * (8 * 2 + 4) for tokens in range(9)]
    assert sizes == [2 * 8 * 2 * exact for exact in (0, 1, 2, 3, 0, 1, 2, 3, 0)]
    assert window_bytes(scheme, 2) == 2 * 8 * 2 * 3


def test_layers_that_are_not_compressed_count_as_stock_code_keeps_them():
    scheme = _scheme(1, 16, 8, 4)
    plain = [PlainLayer(8), PlainLayer(8, 16)]
    assert cache_bytes(scheme, 100, 2, 2, plain) - cache_bytes(scheme, 100, 2, 2) == 2 * 2 * 8 * 2 * (
        100 + 15
    )


def test_no_break_even_without_a_gain():
    assert break_even_tokens(_scheme(1, 16, 8, 8), 2) is None
    assert break_even_tokens_one(_scheme(1, 16, 8, 8), 2) is None
    assert break_even_tokens_one(_scheme(1, 16, 8, 7), 2) is None  # a position takes what 2 channels save


@pytest.mark.parametrize("bits", [None, 2, 4])
@pytest.mark.parametrize(
    ("mode", "window", "group"), [("sliding", 0, 7), ("sliding", 5, 8), ("sliding", 40, 3), ("block", 9, 9)]
)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_one_sequence_takes_less_from_the_told_token_on(bits, mode, window, group, rank):
    scheme = _scheme(2, 16, 12, rank, 5, window=window, mode=mode, bits=bits, key_group=group)
    factors, told = factor_parameters(scheme) * 2, break_even_tokens_one(scheme, 2)
    gains = [
        cache_bytes(scheme, tokens, 1, 2) + factors < full_cache_bytes(scheme, tokens, 2)
        for tokens in range(3 * told)
    ]
    assert all(gains[told:]) and not gains[told - 1]


def test_one_sequence_of_the_shipped_recipe():
    """At 95 tokens 31 are not packed: the formula of whole batches with a window, 93, is too early."""
    layer = KvLayer(hidden=64, width=32, rank_k=12, rank_v=20, value_group=5)
    names = [f"model.layers.{index}.self_attn" for index in range(5)]
    scheme = KvCacheScheme(
        layers=dict.fromkeys(names, layer), window=32, mode="sliding", bits=4, key_group=32
    )
    assert (break_even_tokens(scheme, 4), break_even_tokens_one(scheme, 4)) == (56, 96)


def test_a_stock_cache_keeps_what_its_layers_attend_to():
    plain = [PlainLayer(8), PlainLayer(8, 16)]
    assert full_cache_bytes(_scheme(1, 16, 8, 4), 100, 2, plain) == 2 * 8 * 2 * (100 + 100 + 15)
