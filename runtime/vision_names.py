"""The two names of an image classifier's tensors: in its module, and in the files that stock code writes.

transformers 5 renamed the modules of ViT, DeiT and Swin, and kept the former names in checkpoints:
`save_pretrained` writes them, and `from_pretrained` takes either. Inside the house the names of the modules
are used. Folders that stock classes load are written with the former names, which every release reads.
Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import SourceError

Value = TypeVar("Value")

_VIT_LAYER = re.compile(r"^(vit|deit)\.layers\.(\d+)\.(.+)$")
_VIT_FORMER_LAYER = re.compile(r"^(vit|deit)\.encoder\.layer\.(\d+)\.(.+)$")
_SWIN_BLOCK = re.compile(r"^(swin\.encoder\.layers\.\d+\.blocks\.\d+)\.(.+)$")
_VIT_PARTS: Mapping[str, str] = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_SWIN_PARTS: Mapping[str, str] = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.relative_position_bias": "attention.self",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_TABLE_OF_INDICES = re.compile(
    r"^swin\.encoder\.layers\.\d+\.blocks\.\d+\.attention\."
    r"(self|relative_position_bias)\.relative_position_index$"
)


def stored_name(name: str) -> str:
    """Return the name in a stock checkpoint of a tensor of a module; most are the same."""
    match = _VIT_LAYER.match(name)
    if match:
        return f"{match[1]}.encoder.layer.{match[2]}.{_renamed(match[3], _VIT_PARTS)}"
    match = _SWIN_BLOCK.match(name)
    return f"{match[1]}.{_renamed(match[2], _SWIN_PARTS)}" if match else name


def module_name(name: str) -> str:
    """Return the name in the module of a tensor of a stock checkpoint, whichever of its two names it has."""
    match = _VIT_FORMER_LAYER.match(name)
    if match:
        return f"{match[1]}.layers.{match[2]}.{_renamed(match[3], _inverse(_VIT_PARTS))}"
    match = _SWIN_BLOCK.match(name)
    return f"{match[1]}.{_renamed(match[2], _inverse(_SWIN_PARTS))}" if match else name


def by_module_name(tensors: Mapping[str, Value], where: str) -> dict[str, Value]:
    """Return the tensors of a checkpoint under the names of the module, in their order.

    Swin checkpoints of former releases hold a table of indices per block, which stock classes compute and
    skip; so it is here.

    Raises:
        SourceError: two stored tensors are one tensor of the module.
    """
    named: dict[str, Value] = {}
    for stored, value in tensors.items():
        if _TABLE_OF_INDICES.match(stored):
            continue
        name = module_name(stored)
        if name in named:
            raise SourceError(
                f"{where}: tensor {name!r} is stored under its former name and its name of today",
                hint="the checkpoint was put together from two; fetch it again",
            )
        named[name] = value
    return named


def _renamed(rest: str, parts: Mapping[str, str]) -> str:
    for part, other in parts.items():
        if rest.startswith(f"{part}."):
            return other + rest[len(part) :]
    return rest


def _inverse(parts: Mapping[str, str]) -> dict[str, str]:
    return {other: part for part, other in parts.items()}
