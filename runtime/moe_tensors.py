"""Fused tensors of experts: put together from the parts of a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modules import place
from .moe_names import Part, part_of


@torch.no_grad()
def place_stored(module: nn.Module, name: str, tensor: Tensor, *, requires_grad: bool = False) -> None:
    """Let a stored tensor be the parameter or buffer `name` of a module, or its share of a fused one.

    The fused tensor is allocated with its first part, in that part's dtype; its other parts must follow.

    Args:
        module: with that tensor on the meta device, or with memory.
        name: in the module, or of a part.
        tensor: whole, or [rows, columns] of one expert.
        requires_grad: of parameters.
    """
    part = part_of(name)
    if part is None or _is_split(module, part):
        place(module, name, tensor, requires_grad=requires_grad)
        return
    fused = module.get_parameter(part.fused)
    if fused.is_meta:
        empty = torch.empty(fused.shape, dtype=tensor.dtype, device=tensor.device)
        place(module, part.fused, empty, requires_grad=requires_grad)
        fused = module.get_parameter(part.fused)
    fused[part.expert, part.rows(tuple(fused.shape))] = tensor


def _is_split(module: nn.Module, part: Part) -> bool:
    """Tell whether the experts of a part are linears, of one of which it is the weight."""
    owner, _, leaf = part.fused.rpartition(".")
    return leaf not in module.get_submodule(owner)._parameters
