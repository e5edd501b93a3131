"""Transforms that are decided before bits are: absorbed by their producers and kept, to be applied again.

A scale is multiplied into its producer and divided out of the layers that read it, in float32, so the
model computes what it did and every number of bits is measured behind the same transforms.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ....runtime.atomic import atomic_file
from ..balance import Transform
from ..scheme import Group

_DESCRIPTION = "groups"
_PLAIN = Transform()


@dataclass(frozen=True)
class Transforms:
    """Transforms of groups of layers, by the group's first layer.

    Attributes:
        decided: first layer -> transform, its scale included.
        layers: layer -> what is left for the layer itself: without the scale where a producer absorbs it.
        scales: layer -> the scale of its input, absorbed or not; None without one.
    """

    decided: Mapping[str, Transform]
    layers: Mapping[str, Transform]
    scales: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, decided: Mapping[str, Transform], groups: Iterable[Group]) -> Transforms:
        """Spread the transforms of groups over their layers."""
        layers: dict[str, Transform] = {}
        scales: dict[str, Tensor | None] = {}
        for group in groups:
            transform = decided.get(group.targets[0], _PLAIN)
            left = replace(transform, scale=None) if group.fold is not None else transform
            layers.update(dict.fromkeys(group.targets, left))
            scales.update(dict.fromkeys(group.targets, transform.scale))
        return cls(decided, layers, scales)

    def layer(self, name: str) -> Transform:
        """Return what a layer does to its input when it runs."""
        return self.layers.get(name, _PLAIN)

    def absorbed(self, name: str) -> Tensor | None:
        """Return the scale that reaches a layer's input through its producer; None where none does."""
        scale = self.scales.get(name)
        return None if scale is None or self.layer(name).scale is not None else scale

    def exponent(self, name: str) -> float | None:
        """Return the exponent of a layer's scale; None without one."""
        return self.layer(name).exponent


@torch.no_grad()
def fold(module: nn.Module, group: Group, transform: Transform) -> None:
    """Move a group's scale into its producer, exactly up to rounding; nothing where there is no fold.

    Args:
        module: in float32.
        group: of layers that share an input.
        transform: of the group.
    """
    if group.fold is None or transform.scale is None:
        return
    group.fold.absorb(module, transform.scale)
    for name in group.targets:
        weight = module.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.div_(transform.scale.to(weight.device))


def fold_all(module: nn.Module, groups: Sequence[Group], decided: Mapping[str, Transform]) -> None:
    """Do `fold` for all groups in the order in which they were decided."""
    for group in groups:
        fold(module, group, decided.get(group.targets[0], _PLAIN))


def write_transforms(path: Path, decided: Mapping[str, Transform]) -> None:
    """Keep transforms in a file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any]] = []
    for index, (name, transform) in enumerate(decided.items()):
        described.append({"layer": name, "exponent": transform.exponent, "block": transform.block})
        for key, tensor in (("scale", transform.scale), ("sign", transform.sign)):
            if tensor is not None:
                tensors[f"{index}.{key}"] = tensor.detach().cpu().contiguous()
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata={_DESCRIPTION: json.dumps(described)})


def read_transforms(path: Path, device: torch.device | str = "cpu") -> dict[str, Transform]:
    """Return what `write_transforms` kept."""
    decided = {}
    with safe_open(path, framework="pt") as file:
        there = set(file.keys())
        for index, entry in enumerate(json.loads(file.metadata()[_DESCRIPTION])):
            found = {
                key: file.get_tensor(f"{index}.{key}").to(device) if f"{index}.{key}" in there else None
                for key in ("scale", "sign")
            }
            decided[entry["layer"]] = Transform(
                entry["exponent"], found["scale"], found["sign"], entry["block"]
            )
    return decided
