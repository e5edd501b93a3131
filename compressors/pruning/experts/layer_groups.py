"""Which layers share their coefficients: one group per layer, or groups of consecutive layers.

A group is found by the numbers of its layers, and `assign` checks that every module belongs to exactly one:
a name that matches nothing would leave its layer to the coefficients of others, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ....errors import PlanError

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same coefficients.

    Attributes:
        layers: numbers of the model's layers, rising; those without experts are in no group.
    """

    layers: tuple[int, ...]

    @property
    def name(self) -> str:
        """`layers.3`, or `layers.0-7` for several, of which those without experts are left out."""
        first, last = self.layers[0], self.layers[-1]
        return f"layers.{first}" if first == last else f"layers.{first}-{last}"


def layer_groups(layers: Sequence[int], groups: int | Literal["per_layer"]) -> tuple[LayerGroup, ...]:
    """Deal layers out to groups, by depth.

    Args:
        layers: numbers of the layers that have experts.
        groups: how many; their sizes differ by one layer at most, larger ones first. `per_layer`: one each.

    Raises:
        PlanError: there are fewer layers than groups, or none.
    """
    ordered = sorted(set(layers))
    count = len(ordered) if groups == "per_layer" else groups
    if not ordered:
        raise PlanError("no layer of the model has experts")
    if count > len(ordered):
        raise PlanError(f"groups: {count} groups, but {len(ordered)} layers have experts")
    size, larger = divmod(len(ordered), count)
    found, start = [], 0
    for index in range(count):
        stop = start + size + (index < larger)
        found.append(LayerGroup(tuple(ordered[start:stop])))
        start = stop
    return tuple(found)


def assign(groups: Sequence[LayerGroup], names: Iterable[str]) -> dict[str, int]:
    """Return for every module which group it belongs to.

    Args:
        groups: of `layer_groups`.
        names: of modules of the model, such as `model.layers.7.mlp`.

    Returns:
        Name -> place in `groups`.

    Raises:
        PlanError: a name has no layer that a group holds, or a layer of a group has no name.
    """
    places = {layer: place for place, group in enumerate(groups) for layer in group.layers}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name in names:
        match = _LAYER.search(name)
        layer = int(match[1]) if match else None
        if layer is None or layer not in places:
            raise PlanError(f"{name}: no group of layers holds it; there are {_told(groups)}")
        found[name] = places[layer]
        seen.add(layer)
    missing = sorted(places.keys() - seen)
    if missing:
        raise PlanError(f"groups: no module of the model is in layer {missing[0]} of {_told(groups)}")
    return found


def _told(groups: Sequence[LayerGroup]) -> str:
    names = [group.name for group in groups]
    return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
