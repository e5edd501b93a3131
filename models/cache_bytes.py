"""Bytes that a language model keeps of one token while it generates: keys and values of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.kv.scheme import KvCacheScheme
from ..runtime.kv.sizes import (
    PlainLayer,
    bytes_per_token,
    cache_bytes,
    factor_parameters,
    full_bytes_per_token,
    full_cache_bytes,
)
from ..runtime.kv.support import layers_of
from ..runtime.language_config import language_shape
from ..runtime.moe_classes import is_moe_class
from ..runtime.moe_config import HeadsShape, moe_shape


def kv_bytes_per_token(
    config: Mapping[str, Any], item_bytes: int, scheme: KvCacheScheme | None = None
) -> float | None:
    """Return the bytes of a token's keys and values, in all layers.

    Every layer counts, also one whose window slides: it keeps fewer tokens, but of each as much. A
    compressed layer counts by what its cache holds of a token for good; the exact window has a fixed size
    and is not in it.

    Args:
        config: completed, with `_class_name`, of a language model.
        item_bytes: of a number of the model's type.
        scheme: how the cache is compressed; None: it is not.

    Returns:
        None for models whose attention makes keys and values out of one narrow vector (DeepSeek): which of
        the two the cache keeps depends on the release of transformers.
    """
    width = _cached_width(config)
    if width is None or scheme is None:
        return None if width is None else float(width * item_bytes)
    full = width * item_bytes
    return float(full - full_bytes_per_token(scheme, item_bytes) + bytes_per_token(scheme, item_bytes))


def context_length(config: Mapping[str, Any]) -> int:
    """Return the longest sequence of a language model, in tokens.

    Args:
        config: completed, with `_class_name`.
    """
    if is_moe_class(config["_class_name"]):
        return moe_shape(config).positions
    return language_shape(config).positions


def cache_at_context(config: Mapping[str, Any], item_bytes: int, scheme: KvCacheScheme) -> dict[str, int]:
    """Return the bytes of the whole cache of one sequence as long as the model's context.

    Everything that is kept counts: the exact window, positions, tokens that are not packed yet, and layers
    that are not compressed, of which a sliding window keeps no more than its tokens.

    Args:
        config: completed, with `_class_name`, of a language model.
        item_bytes: of a number of the model's type.
        scheme: how the cache is compressed.

    Returns:
        `tokens`, the context; `before`, of the stock cache; `after`; `with_factors`: after, and the factors.
    """
    tokens, attentions = context_length(config), layers_of(config)
    plain = [PlainLayer(layer.width, layer.sliding_window) for layer in attentions.skipped]
    plain += [PlainLayer(site.width) for site in attentions.compressible if site.name not in scheme.layers]
    after = cache_bytes(scheme, tokens, 1, item_bytes, plain)
    return {
        "tokens": tokens,
        "before": full_cache_bytes(scheme, tokens, item_bytes, plain),
        "after": after,
        "with_factors": after + factor_parameters(scheme) * item_bytes,
    }


def _cached_width(config: Mapping[str, Any]) -> int | None:
    """Return how many numbers an uncompressed cache keeps of a token, None where that is not known."""
    if not is_moe_class(config["_class_name"]):
        shape = language_shape(config)
        return 2 * shape.layers * shape.kv_heads * shape.head_dim
    mixture = moe_shape(config)
    attention = mixture.attention
    if not isinstance(attention, HeadsShape):
        return None
    return 2 * mixture.layers * attention.kv_heads * attention.head_dim
