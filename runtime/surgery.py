"""Give a stock module the sizes that its config does not imply: what pruning left.

Nothing is computed here and no weight is looked at: parameters are replaced by empty ones of the listed
shapes on their own device, and attributes are set. The weights arrive afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import SourceError
from .manifest import ModuleSurgery


def apply_surgery(module: nn.Module, surgery: Mapping[str, ModuleSurgery]) -> None:
    """Resize the listed modules in place.

    Args:
        module: as the stock class builds it from the config.
        surgery: module name -> its own parameters' shapes and its attributes.

    Raises:
        SourceError: a name is not there, or a size is none that pruning can leave.
    """
    for name, cut in surgery.items():
        try:
            child = module.get_submodule(name)
        except AttributeError:
            raise SourceError(f"the manifest lists module {name}, which the model does not have") from None
        for parameter, shape in cut.shapes.items():
            _resize(child, name, parameter, tuple(shape))
        for attribute, value in cut.attributes.items():
            if not isinstance(getattr(child, attribute, None), int | float):
                raise SourceError(f"module {name} has no number {attribute}, which the manifest sets")
            setattr(child, attribute, value)
        follow_weight(child)


def _resize(child: nn.Module, name: str, parameter: str, shape: tuple[int, ...]) -> None:
    old = child._parameters.get(parameter)
    if old is None:
        raise SourceError(f"module {name} has no parameter {parameter}, which the manifest lists")
    real = tuple(old.shape)
    if len(real) != len(shape) or any(new > was for new, was in zip(shape, real, strict=True)):
        raise SourceError(f"{name}.{parameter}: the manifest says {list(shape)}; the model has {list(real)}")
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    child._parameters[parameter] = nn.Parameter(empty, requires_grad=old.requires_grad)


def follow_weight(child: nn.Module) -> None:
    """Let what a module says of its own sizes follow from its weight."""
    weight = child._parameters.get("weight")
    if weight is None:
        return
    if isinstance(child, nn.Linear):
        child.out_features, child.in_features = weight.shape
    elif isinstance(child, nn.LayerNorm):
        child.normalized_shape = tuple(weight.shape)
    elif isinstance(child, nn.Conv2d):
        if child.groups == child.in_channels == child.out_channels:  # depthwise: one filter per channel
            child.groups = child.in_channels = child.out_channels = weight.shape[0]
        else:
            child.out_channels, child.in_channels = weight.shape[0], weight.shape[1] * child.groups
