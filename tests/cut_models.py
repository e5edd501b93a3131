"""Models that are cut by hand, without the package's own pruning, so that storing is tested by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parts:
    """Where the pieces of a block are: names below it, and the attributes of its attention."""

    attention: str
    q: str
    k: str
    v: str
    out: str
    inner: str
    outer: str
    attributes: Callable[[int, int], dict[str, Any]]


def _of_diffusers(heads: int, head_dim: int) -> dict[str, Any]:
    width = heads * head_dim
    return {"heads": heads, "inner_dim": width, "inner_kv_dim": width, "scale": head_dim**-0.5}


def _of_transformers(heads: int, head_dim: int) -> dict[str, Any]:
    return {"num_attention_heads": heads, "head_dim": head_dim, "scaling": head_dim**-0.5}


DIFFUSERS = Parts("attn1", "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", _of_diffusers)
VIT = Parts("attention", "q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2", _of_transformers)


def cut_by_hand(model: Any, sizes: list[tuple[int, int, int]]) -> Any:
    """Cut an `OpenModel` of DiT, PixArt, ViT or DeiT in place, record it, and return it.

    Args:
        model: with uniform widths.
        sizes: (heads, channels of a head, inner width) of every block; which ones stay differs per block.
    """
    parts = VIT if model.family.library == "transformers" else DIFFUSERS
    for index, ((name, block), size) in enumerate(zip(model.family.blocks(model.module), sizes, strict=True)):
        _cut_block(model, parts, f"{name}.", block, size, index)
    return model


def _cut_block(
    model: Any, parts: Parts, prefix: str, block: Any, size: tuple[int, int, int], index: int
) -> None:
    from compress.runtime.manifest import ModuleSurgery

    heads, head_dim, inner = size
    attention = block.get_submodule(parts.attention)
    old_heads = getattr(attention, "heads", None) or attention.num_attention_heads
    old_dim = attention.get_submodule(parts.q).out_features // old_heads
    kept = [
        ((head + index) % old_heads) * old_dim + (channel + head) % old_dim
        for head in range(heads)
        for channel in range(head_dim)
    ]
    wide = block.get_submodule(parts.inner).out_features
    kept_inner = sorted((channel * 3 + index) % wide for channel in range(inner))
    cuts = {
        f"{parts.attention}.{parts.q}": (kept, 0), f"{parts.attention}.{parts.k}": (kept, 0),
        f"{parts.attention}.{parts.v}": (kept, 0), f"{parts.attention}.{parts.out}": (kept, 1),
        parts.inner: (kept_inner, 0), parts.outer: (kept_inner, 1),
    }  # fmt: skip
    for name, (indices, axis) in cuts.items():
        linear = block.get_submodule(name)
        if len(indices) < linear.weight.shape[axis]:
            shapes = _slice(linear, indices, axis)
            model.surgery[prefix + name] = ModuleSurgery(shapes=shapes)
    query = attention.get_submodule(parts.q)
    for tensor in query._parameters.values():
        tensor.data.mul_((head_dim / old_dim) ** 0.5)
    attributes = parts.attributes(heads, head_dim)
    changed = {name: value for name, value in attributes.items() if getattr(attention, name) != value}
    for name, value in changed.items():
        setattr(attention, name, value)
    if changed:
        model.surgery[prefix + parts.attention] = ModuleSurgery(attributes=changed)


def _slice(linear: Any, indices: list[int], axis: int) -> dict[str, tuple[int, ...]]:
    """Keep rows (axis 0) or columns (axis 1) of a linear; return its new shapes."""
    import torch
    from torch import nn

    keep = torch.tensor(indices)
    linear.weight = nn.Parameter(linear.weight.index_select(axis, keep).contiguous(), requires_grad=False)
    shapes: dict[str, tuple[int, ...]] = {"weight": tuple(linear.weight.shape)}
    if axis == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.index_select(0, keep).contiguous(), requires_grad=False)
        shapes["bias"] = tuple(linear.bias.shape)
    linear.out_features, linear.in_features = linear.weight.shape
    return shapes
