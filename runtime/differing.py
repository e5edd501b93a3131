"""What a cut module has otherwise than the stock class builds it: the inverse of `surgery.apply_surgery`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from torch import nn

from ..errors import SourceError
from .manifest import ModuleSurgery, SurgeryAttribute

_ATTRIBUTES: tuple[str, ...] = get_args(SurgeryAttribute)
_HEADS = ("heads", "num_attention_heads")
"""What an attention has; the `scale` of another module may be that of its first random values."""


def difference(module: nn.Module, stock: nn.Module) -> dict[str, ModuleSurgery]:
    """Return what makes `stock` have the sizes and attributes of `module`, which is of the same class.

    Only sizes are compared; both may be on the meta device.

    Raises:
        SourceError: a tensor of `module` is longer than that of `stock`.
    """
    found: dict[str, ModuleSurgery] = {}
    others = dict(stock.named_modules())
    for name, child in module.named_modules():
        other = others.get(name)
        if other is None or type(other) is not type(child):
            raise SourceError(f"module {name} is not part of the original")
        shapes = dict(_smaller(child, other, name))
        named = _ATTRIBUTES if any(key in vars(child) for key in _HEADS) else ()
        attributes: dict[Any, int | float] = {
            key: vars(child)[key] for key in named if _differs(child, other, key)
        }
        if shapes or attributes:
            found[name] = ModuleSurgery(shapes=shapes, attributes=attributes)
    return found


def _smaller(child: nn.Module, other: nn.Module, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, parameter in child._parameters.items():
        if parameter is None:
            continue
        ours, theirs = tuple(parameter.shape), tuple(other.get_parameter(key).shape)
        if len(ours) != len(theirs) or any(a > b for a, b in zip(ours, theirs, strict=True)):
            raise SourceError(f"{name}.{key} is {list(ours)}, and in the original {list(theirs)}")
        if ours != theirs:
            yield key, ours


def _differs(child: nn.Module, other: nn.Module, key: str) -> bool:
    ours, theirs = vars(child).get(key), vars(other).get(key)
    numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
    return numbers and not isinstance(ours, bool) and ours != theirs
