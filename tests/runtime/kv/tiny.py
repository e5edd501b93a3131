"""What the tests of the compressed cache share: schemes for a stock module, and models with factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from compress.runtime.kv.attach import factors_of, put_kv_cache
from compress.runtime.kv.scheme import KvCacheScheme, KvLayer
from compress.runtime.kv.support import layers_of

PUBLISHED: Mapping[str, Any] = {"window": 32, "mode": "sliding", "bits": None, "key_group": 32}
"""What arXiv 2409.10593 has beside the ranks, where nothing is rounded."""


def scheme_for(module: Any, rank_k: int = 6, rank_v: int = 6, **settings: Any) -> KvCacheScheme:
    """Return a scheme with one rank for all layers that can have one; rank 0 means full width."""
    config = {**module.config.to_dict(), "_class_name": type(module).__name__}
    group = settings.pop("value_group", 4)
    layers = {
        attention.name: KvLayer(
            hidden=attention.hidden,
            width=attention.width,
            rank_k=rank_k or attention.width,
            rank_v=rank_v or attention.width,
            value_group=group,
        )
        for attention in layers_of(config).compressible
    }
    return KvCacheScheme(layers=layers, **{**PUBLISHED, **settings})


def fill(module: Any, seed: int = 0) -> None:
    """Factor the projections by a plain SVD: exact at full rank, and the best of the weight alone below."""
    for name, factors in factors_of(module).items():
        attention = module.get_submodule(name)
        for letter in "kv":
            weight = getattr(attention, f"{letter}_proj").weight.detach().float()
            rank = getattr(factors, f"{letter}_a").weight.shape[0]
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            root = s[:rank].sqrt()
            getattr(factors, f"{letter}_a").weight.data.copy_(root[:, None] * v[:rank])
            getattr(factors, f"{letter}_b").weight.data.copy_(u[:, :rank] * root)


def compressed(module: Any, rank_k: int = 6, rank_v: int = 6, **settings: Any) -> Any:
    """Put filled factors into a module and return it."""
    put_kv_cache(module, scheme_for(module, rank_k, rank_v, **settings))
    fill(module)
    return module
