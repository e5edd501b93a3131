"""How the sizes of a cut model are written: in a stock config as far as that can say them.

Three forms, the first that fits: a config from which the stock class builds the model as it is; a config
that says the sizes layer by layer in the library's words; the config of the original. What the config
does not say stands in the manifest and is applied to the module that the stock class builds from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from ..errors import SourceError
from ..models.base import Family
from ..models.shapes import complete_config, expected_shapes
from ..runtime.layered import homogeneous
from ..runtime.manifest import ModuleSurgery, SurgeryAttribute
from ..runtime.surgery import apply_surgery
from ..runtime.validate import CONFIG_NAME, open_folder

SECTION = "quantization_config"
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
    """Choose the form for a model that was opened from `config` and cut by `surgery`.

    Equal sizes give equal forms, whatever `surgery` lists beyond what is needed.
    """
    if not surgery:
        return StoredForm(dict(config), {})
    native = family.native_config(config, surgery)
    layered = family.layered_config(config, surgery) if native is None else None
    chosen = dict(native or layered or config)
    left = difference(_built(family, config, surgery), _built(family, homogeneous(chosen), {}))
    if native is not None and left:
        raise ValueError(f"the native config of the family {family.name} does not build {min(left)} as it is")
    return StoredForm(chosen, left)


def stored_surgery(folder: Path, family: Family, config: Mapping[str, Any]) -> dict[str, ModuleSurgery]:
    """Return what the model in a folder has otherwise than `config` implies, in whichever form it is.

    Args:
        folder: in any format of ours, or a dense stock folder, of the same class as `config`.
        family: of the class.
        config: of the original.

    Raises:
        SourceError: the folder is damaged, or its sizes are none that a model of `config` can be cut to.
    """
    stored = open_folder(folder)
    if stored.class_name != config["_class_name"]:
        raise SourceError(f"{folder}: is of the class {stored.class_name}, not {config['_class_name']}")
    own = {key: value for key, value in homogeneous(stored.config).items() if key != SECTION}
    complete = complete_config(stored.class_name, own, str(folder / CONFIG_NAME))
    same = expected_shapes(stored.class_name, complete) == expected_shapes(stored.class_name, config)
    if same and not stored.manifest.surgery:
        return {}
    return difference(_built(family, complete, stored.manifest.surgery), _built(family, config, {}))


def _built(family: Family, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]) -> nn.Module:
    with torch.device("meta"):
        module = family.build(config)
    apply_surgery(module, surgery)
    return module


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
        attributes: dict[Any, int | float] = {
            key: vars(child)[key] for key in _ATTRIBUTES if _differs(child, other, key)
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
