"""What a checkpoint says of its compressed key-value cache: ranks, window, bytes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..models.cache_bytes import cache_at_context, kv_bytes_per_token
from ..runtime.headers import DTYPE_CODES, ITEM_BYTES
from ..runtime.kv.scheme import KvCacheScheme, factor_tensors
from ..runtime.kv.sizes import break_even_tokens, break_even_tokens_one, factor_parameters, window_bytes
from ..runtime.transformers_config import complete_transformers_config
from ..runtime.validate import CONFIG_NAME, StoredCheckpoint


def cache_stored(stored: StoredCheckpoint) -> dict[str, Any] | None:
    """Describe the compressed cache of a folder; None where the cache is a plain one.

    Returns:
        A JSON value: `window` (tokens kept exactly), `mode`, `bits` (None: the model's own type),
        `key_group`, `bytes_per_token` (`before` and `after`, of all layers, in the model's type),
        `at_context` (as `cache_at_context` has it), `window_bytes`, `factor_parameters`, `factor_bytes` (as
        stored), `break_even_tokens_one` and `break_even_tokens` (None: never; see `runtime.kv.sizes`) and
        `layers`, each with `name, width, rank_k, rank_v`.
    """
    scheme = stored.manifest.kv_cache
    if scheme is None:
        return None
    where = str(stored.folder / CONFIG_NAME)
    config: Mapping[str, Any] = complete_transformers_config(stored.class_name, stored.config, where)
    item_bytes = ITEM_BYTES[DTYPE_CODES[stored.dtype]]
    per_token = {
        "before": kv_bytes_per_token(config, item_bytes),
        "after": kv_bytes_per_token(config, item_bytes, scheme),
    }
    factor_bytes = sum(stored.tensors[name].bytes for name in factor_tensors(scheme))
    whole = cache_at_context(config, item_bytes, scheme)
    return described_cache(scheme, per_token, item_bytes, factor_bytes, whole)


def described_cache(
    scheme: KvCacheScheme,
    bytes_per_token: Mapping[str, float | None],
    item_bytes: int,
    factor_bytes: int,
    at_context: Mapping[str, int] | None,
) -> dict[str, Any]:
    """Return what `cache_stored` does.

    Args:
        scheme: of the cache.
        bytes_per_token: `before` and `after`.
        item_bytes: of a number of the model's type.
        factor_bytes: as stored.
        at_context: of `cache_at_context`; None where the model's context is not known.
    """
    return {
        "window": scheme.window,
        "mode": scheme.mode,
        "bits": scheme.bits,
        "key_group": scheme.key_group,
        "bytes_per_token": dict(bytes_per_token),
        "at_context": None if at_context is None else dict(at_context),
        "window_bytes": window_bytes(scheme, item_bytes),
        "factor_parameters": factor_parameters(scheme),
        "factor_bytes": factor_bytes,
        "break_even_tokens_one": break_even_tokens_one(scheme, item_bytes),
        "break_even_tokens": break_even_tokens(scheme, item_bytes),
        "layers": [
            {"name": name, "width": layer.width, "rank_k": layer.rank_k, "rank_v": layer.rank_v}
            for name, layer in scheme.layers.items()
        ],
    }
