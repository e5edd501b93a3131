"""Copy a module's structure without its memory, with the quantized layers replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from ..runtime.conv import QuantizedConv2d
from ..runtime.linear import QuantizedLinear
from ..runtime.manifest import KernelScheme
from ..runtime.modules import quantized_layers


def swapped(module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return a module of the same structure with other layers in the named places.

    All other tensors are shared with `module`; change neither of the two afterwards.
    """
    tensors = chain(module.parameters(), module.buffers())
    clone = copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(clone.get_submodule(parent), attribute, layer)
    return clone.eval()


def replaced(module: nn.Module, weight_of: Callable[[str, QuantizedLinear], Tensor]) -> nn.Module:
    """Return a module of the same structure whose quantized layers are `nn.Linear`s and `nn.Conv2d`s.

    All other tensors are shared with `module`; change neither of the two afterwards.

    Args:
        weight_of: called with the name and the layer; returns the weight of its linear [out, in], or of
            its convolution [out, in, height, width].
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in quantized_layers(module).items():
        weight = weight_of(name, layer)
        if isinstance(layer, QuantizedConv2d):
            layers[name] = conv_around(weight, layer.bias, layer.window)
        else:
            layers[name] = linear_around(weight, layer.bias)
    return swapped(module, layers)


def conv_around(weight: Tensor, bias: Tensor | None, kernel: KernelScheme) -> nn.Conv2d:
    """Return a convolution that holds these tensors, without copying them."""
    with torch.device("meta"):
        conv = nn.Conv2d(
            weight.shape[1], weight.shape[0], kernel.size, kernel.stride, kernel.padding, kernel.dilation,
            bias=bias is not None,
        )  # fmt: skip
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


def linear_around(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a linear layer that holds these tensors, without copying them."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
