"""What may be removed from a diffusion transformer of diffusers: heads, their channels, inner channels.

Channels of the residual stream stay: the position embedding is computed from the config at the stream's
width, is no part of the checkpoint, and would come out with other values at another width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from .base import Shapes
from .structure import AttentionSite, Meaning, PrunableStructure

_ATTRIBUTES: Mapping[str, Meaning] = MappingProxyType(
    {"heads": "heads", "inner_dim": "width", "inner_kv_dim": "width", "scale": "scale"}
)


def diffusion_structure(
    blocks: Sequence[tuple[str, nn.Module]], attentions: Sequence[tuple[str, nn.Module]]
) -> PrunableStructure:
    """Describe a transformer whose blocks hold diffusers' `Attention`s and one `FeedForward` named `ff`.

    Args:
        blocks: name and module, in forward order.
        attentions: name and module, in forward order; every one is a child of a block.
    """
    index = {name: number for number, (name, _) in enumerate(blocks)}
    sites = tuple(_site(name, attention, index[name.rpartition(".")[0]]) for name, attention in attentions)
    inner = {f"{name}.ff.net.0.proj": number for name, number in index.items()}
    return PrunableStructure(attentions=sites, inner=inner, width=False)


def _site(name: str, attention: Any, block: int) -> AttentionSite:
    heads = int(attention.heads)
    return AttentionSite(
        name=name,
        block=block,
        q=f"{name}.to_q",
        k=f"{name}.to_k",
        v=f"{name}.to_v",
        out=f"{name}.to_out.0",
        heads=heads,
        head_dim=int(attention.inner_dim) // heads,
        attributes=_ATTRIBUTES,
    )


def attention_width(shapes: Shapes, name: str, default: int) -> int:
    """Return heads * head_dim of the attention `name`, after pruning where `shapes` has it."""
    weight = shapes.get(f"{name}.to_q.weight")
    return default if weight is None else weight[0]


def inner_width(shapes: Shapes, name: str, default: int) -> int:
    """Return the inner channels of the feed-forward network `name`, after pruning where `shapes` has it."""
    weight = shapes.get(f"{name}.net.2.weight")
    return default if weight is None else weight[1]
