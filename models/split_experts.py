"""The tensors of a planned model whose experts are linears of their own, and those of one put together again.

Shapes and names alone; `runtime.linear_experts` does the same to a module.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..runtime.moe_names import expert_linear, part_of, parts_of

if TYPE_CHECKING:
    from .base import TensorSpec


def split_tensors(class_name: str, tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the tensors with every expert's in the place of the fused ones, in the order of the module.

    Args:
        class_name: of the stock class; where it stores experts fused, they stay so.
        tensors: of the model.
    """
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, tensor in tensors.items():
        found = parts_of(class_name, name, tensor.shape)
        owner = name.rpartition(".")[0]
        parts.setdefault(owner, {}).update(
            {piece: replace(tensor, shape=part.shape(tensor.shape)) for piece, part in found.items()}
        )
    split: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        owner = name.rpartition(".")[0]
        if not parts_of(class_name, name, tensor.shape):
            split[name] = tensor
        elif parts[owner]:
            # Expert by expert: gate, up, down. A stable sort keeps the leaves in that order.
            split |= dict(sorted(parts[owner].items(), key=lambda item: _expert(item[0])))
            parts[owner] = {}
    return split


def fused_tensors(tensors: Mapping[str, TensorSpec], quantized: Collection[str]) -> dict[str, TensorSpec]:
    """Return the tensors with experts of which no layer is quantized as the stock class has them.

    Args:
        tensors: of `split_tensors`, or of a plan that started with them.
        quantized: names of quantized layers.
    """
    split = {found[0] for name in quantized if (found := expert_linear(name))}
    fused: dict[str, TensorSpec] = {}
    for name, tensor in tensors.items():
        part = part_of(name)
        if part is None or part.fused.rpartition(".")[0] in split:
            fused[name] = tensor
            continue
        before = fused.get(part.fused)
        rows, columns = tensor.shape
        experts = part.expert + 1
        height = rows if part.half is None else 2 * rows
        shape = (experts, height, columns)
        fused[part.fused] = replace(tensor, shape=shape) if before is None else replace(before, shape=shape)
    return fused


def _expert(name: str) -> int:
    part = part_of(name)
    return -1 if part is None else part.expert
