"""What a compressed cache takes, to the byte, and what it costs to read; torch-free.

CSKV, arXiv 2409.10593. The published ratios leave out the window, the factors and what quantization stores
beside the integers; everything here counts them, and says where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .scheme import KvCacheScheme, KvLayer

POSITION_BYTES = 4
"""Of one token's position (int32); kept once per row and model, not per layer."""
_GRID_BYTES = 4
"""Of one group: scale and offset, float16 each."""


@dataclass(frozen=True)
class PlainLayer:
    """An attention whose cache is the stock one.

    Attributes:
        width: channels of its keys, and of its values: KV heads * head_dim.
        sliding_window: latest tokens that it attends to; None: all.
    """

    width: int
    sliding_window: int | None = None

    def tokens(self, tokens: int) -> int:
        """Return how many of `tokens` its cache holds; of a sliding window all but the first."""
        return tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1)


def bytes_per_token(scheme: KvCacheScheme, item_bytes: int) -> float:
    """Return the bytes that one more token adds to the compressed layers, scales and offsets included.

    The token's position (`POSITION_BYTES` for all layers together) and the window are not in it;
    `cache_bytes` has them.

    Args:
        scheme: of the cache.
        item_bytes: of a number in the model's floating-point type.
    """
    return sum(_token_bytes(layer, scheme, item_bytes) for layer in scheme.layers.values())


def metadata_bytes_per_token(scheme: KvCacheScheme) -> float:
    """Return the part of `bytes_per_token` that is scales and offsets; 0 where nothing is quantized."""
    if scheme.bits is None:
        return 0.0
    return sum(
        layer.rank_k * _GRID_BYTES / scheme.key_group + _value_groups(layer) * _GRID_BYTES
        for layer in scheme.layers.values()
    )


def full_bytes_per_token(scheme: KvCacheScheme, item_bytes: int) -> int:
    """Return what a token takes in the same layers without compression: keys and values in full."""
    return sum(2 * layer.width * item_bytes for layer in scheme.layers.values())


def window_bytes(scheme: KvCacheScheme, item_bytes: int) -> int:
    """Return what the exact tokens of one row take at most.

    In mode `block` they are at most window - 1: a full block is kept compressed alone.
    """
    exact = scheme.window if scheme.mode == "sliding" else scheme.window - 1
    return exact * full_bytes_per_token(scheme, item_bytes)


def cache_bytes(
    scheme: KvCacheScheme, tokens: int, batch: int, item_bytes: int, plain: Iterable[PlainLayer] = ()
) -> int:
    """Return the bytes of all tensors of a cache; what `CskvCache.stored_bytes` finds.

    Args:
        scheme: of the cache.
        tokens: that were cached, per row.
        batch: rows.
        item_bytes: of a number in the model's floating-point type.
        plain: the attentions that are not compressed.
    """
    row = _counted(scheme, item_bytes).of_row(scheme, tokens)
    return batch * (row + _plain_bytes(plain, tokens, item_bytes))


def full_cache_bytes(
    scheme: KvCacheScheme, tokens: int, item_bytes: int, plain: Iterable[PlainLayer] = ()
) -> int:
    """Return the bytes of one row of the stock cache of the same layers; see `cache_bytes`."""
    return tokens * full_bytes_per_token(scheme, item_bytes) + _plain_bytes(plain, tokens, item_bytes)


def exact_tokens(scheme: KvCacheScheme, tokens: int) -> int:
    """Return how many of `tokens` are kept exactly, too."""
    return min(tokens, scheme.window) if scheme.mode == "sliding" else tokens % scheme.window


def compressed_tokens(scheme: KvCacheScheme, tokens: int) -> int:
    """Return how many of `tokens` the next one reads out of the compressed cache; with bits, as integers."""
    behind = tokens - exact_tokens(scheme, tokens)
    return behind if scheme.bits is None else min(behind, tokens // scheme.key_group * scheme.key_group)


def factor_parameters(scheme: KvCacheScheme) -> int:
    """Return the parameters of all factors."""
    return sum(
        (layer.hidden + layer.width) * (layer.rank_k + layer.rank_v) for layer in scheme.layers.values()
    )


def break_even_tokens(scheme: KvCacheScheme, item_bytes: int) -> int | None:
    """Return from how many cached tokens on, of all rows together, the factors pay off, as published.

    Windows, positions, and tokens that are not packed yet are left out; `break_even_tokens_one` has them.

    Args:
        scheme: of the cache.
        item_bytes: of a number in the model's floating-point type.

    Returns:
        None: never, because a compressed token is no smaller than a full one.
    """
    saved = full_bytes_per_token(scheme, item_bytes) - bytes_per_token(scheme, item_bytes)
    return math.ceil(factor_parameters(scheme) * item_bytes / saved) if saved > 0 else None


def break_even_tokens_one(scheme: KvCacheScheme, item_bytes: int) -> int | None:
    """Return from how many tokens on one sequence takes less, its whole cache and the factors counted.

    Of that many tokens and of any more, `cache_bytes` and the factors are less than a stock cache. Between
    two groups that are packed, or two blocks, the bytes per token change; over a whole group or block they
    grow evenly, so the last token count without a gain is known from one of them.

    Args:
        scheme: of the cache.
        item_bytes: of a number in the model's floating-point type.

    Returns:
        None: never.
    """
    counted = _counted(scheme, item_bytes)
    factors = factor_parameters(scheme) * item_bytes

    def added(tokens: int) -> int:
        return counted.of_row(scheme, tokens) + factors - tokens * counted.full

    if scheme.mode == "block":  # nothing is gained within a block, so that its last token is the worst
        period, counts = scheme.window, range(scheme.window - 1, scheme.window)
    else:
        period = 1 if scheme.bits is None else scheme.key_group
        counts = range(scheme.window, scheme.window + period)
    saved = added(counts[0]) - added(counts[0] + period)
    if saved <= 0:
        return None
    return 1 + max(tokens + period * (added(tokens) // saved) for tokens in counts)


def rebuild_flops(scheme: KvCacheScheme, tokens: int) -> int:
    """Return the operations that rebuild keys and values of `tokens` from the cache, for one decoded token.

    2 * tokens * (r_K + r_V) * h_kv per layer; a multiplication and an addition count as two.
    """
    return sum(2 * tokens * (layer.rank_k + layer.rank_v) * layer.width for layer in scheme.layers.values())


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` integers, padded to a whole byte."""
    return (count * bits + 7) // 8


def _value_groups(layer: KvLayer) -> int:
    return -(-layer.rank_v // layer.value_group)


def _group_bytes(layer: KvLayer, scheme: KvCacheScheme) -> int:
    """Bytes of one quantized group of `key_group` tokens of a layer, keys and values."""
    bits = scheme.bits or 0
    keys = layer.rank_k * (packed_bytes(scheme.key_group, bits) + _GRID_BYTES)
    values = packed_bytes(layer.rank_v, bits) + _value_groups(layer) * _GRID_BYTES
    return keys + scheme.key_group * values


def _token_bytes(layer: KvLayer, scheme: KvCacheScheme, item_bytes: int) -> float:
    if scheme.bits is None:
        return (layer.rank_k + layer.rank_v) * item_bytes
    return _group_bytes(layer, scheme) / scheme.key_group


@dataclass(frozen=True)
class _Counted:
    """Bytes in all compressed layers: of a quantized group, and of a token in floating point and in full."""

    group: int
    floating: int
    full: int

    def of_row(self, scheme: KvCacheScheme, tokens: int) -> int:
        groups = tokens // scheme.key_group if scheme.bits is not None else 0
        rest = tokens - groups * scheme.key_group
        exact = exact_tokens(scheme, tokens) * self.full
        return tokens * POSITION_BYTES + groups * self.group + rest * self.floating + exact


def _counted(scheme: KvCacheScheme, item_bytes: int) -> _Counted:
    layers = scheme.layers.values()
    group = 0 if scheme.bits is None else sum(_group_bytes(layer, scheme) for layer in layers)
    floating = sum(layer.rank_k + layer.rank_v for layer in layers) * item_bytes
    return _Counted(group, floating, full_bytes_per_token(scheme, item_bytes))


def _plain_bytes(plain: Iterable[PlainLayer], tokens: int, item_bytes: int) -> int:
    return sum(2 * layer.width * layer.tokens(tokens) * item_bytes for layer in plain)


def operations(count: float) -> str:
    """Write a count of floating-point operations: "13.7 TFLOP"."""
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} PFLOP"
