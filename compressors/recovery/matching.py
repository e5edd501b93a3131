"""Which blocks of a model and of the original should put out the same, after blocks were removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import PlanError
from ...models.blocks import depths
from ...models.origins import kept_blocks, removals
from ...recipes.depth import Groups
from ..pruning.block_groups import BlockGroup, groups_of, matched

Pairs = dict[str, list[tuple[int, int]]]
"""List of blocks -> (block of the model, block of the original)."""


def matched_blocks(config: Mapping[str, Any], origins: str | None) -> Pairs:
    """Return the pairs of all lists of blocks, in order.

    Where N of every M blocks were kept once: the last block of what stayed of a group, and of the group.
    Where blocks were removed in another way, in several rounds, or not as the groups say: each block that
    stayed, and the last of those after it that went, for which it has to stand as well. Of a list that is
    whole: equal blocks.

    Args:
        config: of the original, completed, with `_class_name`.
        origins: the file of `models.origins` that the model carries; None: no block was removed.
    """
    known = depths(config)
    kept = {name: tuple(range(depth)) for name, depth in known.items()}
    if origins is None:
        return {name: [(place, place) for place in places] for name, places in kept.items()}
    kept |= kept_blocks(origins)
    found = {name: _by_place(places, known[name]) for name, places in kept.items()}
    groups = _groups(config, removals(origins), kept)
    return found if groups is None else {**found, **matched(config, groups)}


def _groups(
    config: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], kept: Mapping[str, Sequence[int]]
) -> list[BlockGroup] | None:
    """Return the groups by which blocks were removed at once; None where none are known that led to this."""
    asked = _asked(rounds[0].get("groups")) if len(rounds) == 1 else None
    if asked is None:
        return None
    try:
        found = groups_of(config, asked)
    except PlanError:  # of another model: what is kept is known all the same
        return None
    return found if _lead_to(kept, found, depths(config)) else None


def _lead_to(
    kept: Mapping[str, Sequence[int]], groups: Sequence[BlockGroup], known: Mapping[str, int]
) -> bool:
    """Tell whether of every group as many units stay as it says, and all blocks that are in none."""
    free = {name: set(range(depth)) for name, depth in known.items()}
    fits = True
    for group in groups:
        free[group.blocks] -= set(group.members)
        staying = set(kept[group.blocks])
        whole = sum(staying.issuperset(unit) for unit in group.units)
        fits &= whole == group.kept == sum(not staying.isdisjoint(unit) for unit in group.units)
    return fits and all(places <= set(kept[name]) for name, places in free.items())


def _by_place(places: Sequence[int], depth: int) -> list[tuple[int, int]]:
    ends = [*(place - 1 for place in places[1:]), depth - 1]
    return list(enumerate(ends))


def _asked(groups: Any) -> Groups | dict[str, Groups] | None:
    """Return groups as settings have them: of JSON a list is a tuple there."""
    if isinstance(groups, Mapping):
        return {name: tuple(one) if isinstance(one, list) else one for name, one in groups.items()}
    return tuple(groups) if isinstance(groups, list) else groups
