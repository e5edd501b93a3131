"""The largest and the smallest model that may be left, where blocks differ in size and data decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...models.base import ModelSpec
from ...models.larger_blocks import larger_blocks
from ...models.shallower import shallower_spec
from ...recipes.depth import DepthSettings
from .block_choice import Kept, Unit, units_to_remove, without
from .block_groups import BlockGroup, kept_of

Range = tuple[Kept, Kept]
"""What stays of the largest model that may be left, and of the smallest."""


def range_of_groups(config: Mapping[str, Any], groups: Sequence[BlockGroup]) -> Range:
    """Return the range of a choice of one candidate in every group.

    Args:
        config: of the model, completed, with `_class_name`.
        groups: from `block_groups.groups_of`.
    """
    larger = larger_blocks(config)
    ends: tuple[list[int], list[int]] = [], []
    for group in groups:
        held = [sum((group.blocks, place) in larger for place in unit) for unit in group.units]
        counts = group.candidates() @ torch.tensor(held, dtype=torch.float32)
        ends[0].append(int(counts.argmax()))
        ends[1].append(int(counts.argmin()))
    return kept_of(config, groups, ends[0]), kept_of(config, groups, ends[1])


def range_of_count(config: Mapping[str, Any], settings: DepthSettings) -> Range:
    """Return the range of a rule that looks at data: any blocks may go, as many as are asked for.

    Args:
        config: of the model, completed, with `_class_name`.
        settings: of the stage; `shortgpt` never removes the last block.

    Raises:
        PlanError: as `block_choice.units_to_remove`.
    """
    larger = larger_blocks(config)
    ends: tuple[dict[str, list[Unit]], dict[str, list[Unit]]] = {}, {}
    for name, (units, gone) in units_to_remove(config, settings).items():
        free = units[:-1] if settings.by == "shortgpt" and gone < len(units) else units

        def held(unit: Unit, name: str = name) -> int:
            return sum((name, place) in larger for place in unit)

        ends[0][name] = sorted(free, key=held)[:gone]
        ends[1][name] = sorted(free, key=held, reverse=True)[:gone]
    return without(config, ends[0]), without(config, ends[1])


def specs_of(spec: ModelSpec, ends: Range) -> tuple[ModelSpec, ModelSpec | None, list[str]]:
    """Return the largest model that may be left, the smallest where that is another, and what to tell.

    Args:
        spec: the model as the stage finds it.
        ends: what stays of it.
    """
    most, least = (shallower_spec(spec, end) for end in ends)
    low, high = least.size(), most.size()
    if (low.bytes, low.macs) == (high.bytes, high.macs):
        return most, None, []
    note = (
        f"blocks differ in size: {low.parameters:,} to {high.parameters:,} parameters are left, by which"
        " blocks stay; memory and disk are planned for the most"
    )
    return most, least, [note]
