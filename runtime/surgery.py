"""Give a stock module the sizes that its config does not imply: what pruning left.

Nothing is computed here and no weight is looked at: parameters are replaced by empty ones of the listed
shapes on their own device, and attributes are set. The weights arrive afterwards. What is listed may come
from a folder of anyone, so sizes only shrink, and everything that a module says of itself must agree
before a byte is allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import SourceError
from .attention_sizes import HINT, attentions_near, check_attention, head_dim_of
from .manifest import ModuleSurgery
from .sam_stream import check_stream


def apply_surgery(module: nn.Module, surgery: Mapping[str, ModuleSurgery]) -> None:
    """Resize the listed modules in place.

    Args:
        module: as the stock class builds it from the config; on the meta device nothing is allocated.
        surgery: module name -> its own parameters' shapes and its attributes.

    Raises:
        SourceError: a name is not there, a size is none that pruning can leave, or what is left does not
            fit together.
    """
    attentions = {name: head_dim_of(_find(module, name), name) for name in attentions_near(module, surgery)}
    for name, cut in surgery.items():
        child = _find(module, name)
        depthwise = _is_depthwise(child)
        for parameter, shape in cut.shapes.items():
            _resize(child, name, parameter, tuple(shape))
        for attribute, value in cut.attributes.items():
            _set(child, name, attribute, value)
        follow_weight(child)
        _check_module(child, name, depthwise)
    for name, head_dim in attentions.items():
        check_attention(module.get_submodule(name), name, head_dim)
    check_stream(module)


def _find(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise SourceError(
            f"the manifest lists module {name}, which the model does not have", hint=HINT
        ) from None


def _resize(child: nn.Module, name: str, parameter: str, shape: tuple[int, ...]) -> None:
    old = child._parameters.get(parameter)
    if old is None:
        raise SourceError(f"module {name} has no parameter {parameter}, which the manifest lists", hint=HINT)
    real = tuple(old.shape)
    if len(real) != len(shape) or any(new > was for new, was in zip(shape, real, strict=True)):
        raise SourceError(
            f"{name}.{parameter}: the manifest says {list(shape)}; the config implies {list(real)}, and"
            " pruning only makes it smaller",
            hint=HINT,
        )
    if isinstance(child, nn.Conv2d) and shape[2:] != real[2:]:
        raise SourceError(
            f"{name}.{parameter}: {list(shape)} has another window than {list(real)}", hint=HINT
        )
    # Of tables of positions and tokens, stock code interpolates or repeats one that is too short, silently.
    is_table = not isinstance(child, nn.Linear | nn.Conv2d | nn.LayerNorm)
    if is_table and shape[:-1] != real[:-1]:
        raise SourceError(
            f"{name}.{parameter}: the manifest says {list(shape)}; of {list(real)}, pruning removes columns",
            hint=HINT,
        )
    empty = torch.empty(shape, dtype=old.dtype, device=old.device)
    child._parameters[parameter] = nn.Parameter(empty, requires_grad=old.requires_grad)


def _set(child: nn.Module, name: str, attribute: str, value: int | float) -> None:
    old = vars(child).get(attribute)
    if isinstance(old, bool) or not isinstance(old, int | float):
        raise SourceError(f"module {name} has no number {attribute}, which the manifest sets", hint=HINT)
    if isinstance(old, int) and (not isinstance(value, int) or value > old):
        raise SourceError(
            f"module {name}: the manifest sets {attribute} to {value}; pruning leaves an integer of at most"
            f" {old}",
            hint=HINT,
        )
    setattr(child, attribute, value)


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
        if _is_depthwise(child):
            child.groups = child.in_channels = child.out_channels = weight.shape[0]
        else:
            child.out_channels, child.in_channels = weight.shape[0], weight.shape[1] * child.groups


def _is_depthwise(child: nn.Module) -> bool:
    """Tell whether a convolution has one filter per channel; one of a single channel may be either."""
    return isinstance(child, nn.Conv2d) and 1 < child.groups == child.in_channels == child.out_channels


def _check_module(child: nn.Module, name: str, depthwise: bool) -> None:
    """Refuse a weight and a bias that do not belong together."""
    weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
    if weight is None or not isinstance(child, nn.Linear | nn.LayerNorm | nn.Conv2d):
        return
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise SourceError(
            f"module {name}: the manifest leaves a weight of {list(weight.shape)} with a bias of"
            f" {list(bias.shape)}",
            hint=HINT,
        )
    if isinstance(child, nn.Conv2d) and not depthwise and child.groups > 1:
        raise SourceError(f"module {name}: a convolution of {child.groups} groups is not pruned", hint=HINT)
