"""Copy a module's structure without its memory, with the quantized layers replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn

from ..runtime.linear import QuantizedLinear
from ..runtime.modules import quantized_layers


def replaced(module: nn.Module, weight_of: Callable[[str, QuantizedLinear], Tensor]) -> nn.Module:
    """Return a module of the same structure whose quantized layers are `nn.Linear`s.

    All other tensors are shared with `module`; change neither of the two afterwards.

    Args:
        weight_of: called with the name and the layer; returns the weight [out, in] of its linear.
    """
    tensors = chain(module.parameters(), module.buffers())
    clone = copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
    for name, layer in quantized_layers(module).items():
        parent, _, attribute = name.rpartition(".")
        setattr(clone.get_submodule(parent), attribute, linear_around(weight_of(name, layer), layer.bias))
    return clone.eval()


def linear_around(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that holds these tensors, without copying them."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
