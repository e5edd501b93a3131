"""How the sizes of a cut model are written: in a stock config as far as that can say them.

Three forms, the first that fits: a config from which the stock class builds the model as it is; a config
that says the sizes layer by layer in the library's words; the config of the original. What the config
does not say stands in the manifest and is applied to the module that the stock class builds from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from ..models.base import Family
from ..runtime.layered import homogeneous
from ..runtime.manifest import ModuleSurgery, SurgeryAttribute
from ..runtime.surgery import apply_surgery

_ATTRIBUTES: tuple[str, ...] = get_args(SurgeryAttribute)


@dataclass(frozen=True)
class StoredForm:
    """What a folder says of its sizes.

    Attributes:
        config: config.json, without a section on quantization.
        surgery: what differs from what the stock class builds from it.
    """

    config: dict[str, Any]
    surgery: dict[str, ModuleSurgery]


def stored_form(
    family: Family, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
) -> StoredForm:
    """Choose the form for a model that was opened from `config` and cut by `surgery`."""
    if not surgery:
        return StoredForm(dict(config), {})
    native = family.native_config(config, surgery)
    layered = family.layered_config(config, surgery) if native is None else None
    chosen = native or layered
    if chosen is None:
        return StoredForm(dict(config), dict(surgery))
    left = difference(_built(family, config, surgery), _built(family, homogeneous(chosen), {}))
    if native is not None and left:
        raise ValueError(f"the native config of the family {family.name} does not build {min(left)} as it is")
    return StoredForm(dict(chosen), left)


def _built(family: Family, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]) -> nn.Module:
    with torch.device("meta"):
        module = family.build(config)
    apply_surgery(module, surgery)
    return module


def difference(module: nn.Module, stock: nn.Module) -> dict[str, ModuleSurgery]:
    """Return what makes `stock` have the sizes and attributes of `module`, which is of the same class.

    Only sizes are compared; both may be on the meta device.
    """
    found: dict[str, ModuleSurgery] = {}
    others = dict(stock.named_modules())
    for name, child in module.named_modules():
        other = others[name]
        shapes = {
            key: tuple(parameter.shape)
            for key, parameter in child._parameters.items()
            if parameter is not None and parameter.shape != other.get_parameter(key).shape
        }
        attributes: dict[Any, int | float] = {
            key: getattr(child, key) for key in _ATTRIBUTES if _differs(child, other, key)
        }
        if shapes or attributes:
            found[name] = ModuleSurgery(shapes=shapes, attributes=attributes)
    return found


def _differs(child: nn.Module, other: nn.Module, key: str) -> bool:
    ours, theirs = getattr(child, key, None), getattr(other, key, None)
    numbers = isinstance(ours, int | float) and isinstance(theirs, int | float)
    return numbers and not isinstance(ours, bool) and ours != theirs
