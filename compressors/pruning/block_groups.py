"""N:M groups of blocks: which choices there are, and which blocks of two models stand for each other.

TinyFusion (arXiv 2412.01199) cuts the blocks of a model into consecutive groups; of the M blocks of a group N
stay, whatever the other groups do. So the depth of the result is known from the start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from ...errors import PlanError
from ...models.blocks import block_lists, depths
from ...recipes.depth import Groups, pair_of

MAX_CHOICES = 20_000
"""Of one group: each has a logit, and its row in a table."""


@dataclass(frozen=True)
class BlockGroup:
    """Consecutive blocks of which some stay.

    Attributes:
        blocks: name of the list.
        units: what is chosen among: places that go together, in order.
        kept: how many units stay.
    """

    blocks: str
    units: tuple[tuple[int, ...], ...]
    kept: int

    @property
    def members(self) -> tuple[int, ...]:
        """Places in the list, ascending."""
        return tuple(sorted(place for unit in self.units for place in unit))

    @property
    def told(self) -> str:
        """Its members as people write them: "0 to 3", or "0, 1, 38, 39"."""
        first, last = self.members[0], self.members[-1]
        if len(self.members) > 1 and last - first + 1 == len(self.members):
            return f"{first} to {last}"
        return ", ".join(map(str, self.members))

    @property
    def choices(self) -> int:
        """How many ways there are."""
        return comb(len(self.units), self.kept)

    def candidates(self) -> Tensor:
        """Return all ways, [choices, units] float32: 1 where a unit stays; in lexicographic order."""
        rows = list(combinations(range(len(self.units)), self.kept))
        table = torch.zeros(len(rows), len(self.units))
        table.scatter_(1, torch.tensor(rows), 1.0)
        return table

    def places(self, choice: int) -> tuple[int, ...]:
        """Return the places that stay with one of the ways, ascending."""
        row = self.candidates()[choice]
        return tuple(
            sorted(p for unit, stays in zip(self.units, row.tolist(), strict=True) if stays for p in unit)
        )


def groups_of(config: Mapping[str, Any], asked: Groups | Mapping[str, Groups]) -> list[BlockGroup]:
    """Return the groups of all lists of blocks, in the order in which the blocks run.

    Args:
        config: of the model, completed, with `_class_name`.
        asked: `N:M`, repeated to the depth, or a list of them; by list where the model has several. Lists
            that are not named stay whole.

    Raises:
        PlanError: the groups do not add up to the depth, keep more than they have, keep everything, or have
            too many choices; or a list that the model has not.
    """
    known = depths(config)
    by_list = dict(asked) if isinstance(asked, Mapping) else _for_all(known, asked)
    unknown = [name for name in by_list if name not in known]
    if unknown:
        raise PlanError(f"groups: the model has no {unknown[0]}", hint=f"it has: {', '.join(known)}")
    found = []
    for blocks in block_lists(config["_class_name"]):
        if blocks.name in by_list:
            units = units_of(known[blocks.name], blocks.mirrored, blocks.name)
            found += _cut(blocks.name, units, by_list[blocks.name])
    if all(group.kept == len(group.units) for group in found):
        raise PlanError("groups: every block stays, so nothing would be removed")
    return found


def _for_all(known: Mapping[str, int], asked: Groups) -> dict[str, Groups]:
    if len(known) > 1 and not isinstance(asked, str):
        raise PlanError(
            f"groups: the model has {len(known)} lists of blocks, and one list of groups",
            hint=f"write groups as a mapping with the keys {', '.join(known)}",
        )
    return dict.fromkeys(known, asked)


def units_of(depth: int, mirrored: bool, name: str) -> list[tuple[int, ...]]:
    """Return what is chosen among: blocks, or pairs of blocks that go together.

    The two middle blocks of a mirrored list always stay, and are no unit.

    Args:
        depth: of the list.
        mirrored: see `BlockList`.
        name: of the list, for messages.

    Raises:
        PlanError: a mirrored list of odd depth.
    """
    if not mirrored:
        return [(place,) for place in range(depth)]
    if depth % 2:
        raise PlanError(f"{name}: no block can go from an odd depth of {depth}: its skips are not pairs")
    return [(place, depth - 1 - place) for place in range(depth // 2 - 1)]


def _cut(name: str, units: Sequence[tuple[int, ...]], asked: Groups) -> list[BlockGroup]:
    pairs = [pair_of(group) for group in ((asked,) if isinstance(asked, str) else asked)]
    for kept, size in pairs:
        if kept > size:
            raise PlanError(f"groups: {kept}:{size} keeps more blocks than it has")
        if comb(size, kept) > MAX_CHOICES:
            raise PlanError(
                f"groups: {kept}:{size} has {comb(size, kept):,} choices, and at most {MAX_CHOICES:,} can"
                " be learned",
                hint="take smaller groups; the paper's best are 1:2 and 2:4",
            )
    if isinstance(asked, str):
        size = pairs[0][1]
        if len(units) % size:
            raise PlanError(
                _told(name, units, f"{asked} repeated does not fill them"),
                hint=_hint(name, len(units), pairs[0]),
            )
        pairs *= len(units) // size
    if sum(size for _, size in pairs) != len(units):
        raise PlanError(
            _told(name, units, f"the groups have {sum(size for _, size in pairs)} together"),
            hint="the second numbers of the groups must add up to it",
        )
    found, start = [], 0
    for kept, size in pairs:
        found.append(BlockGroup(name, tuple(units[start : start + size]), kept))
        start += size
    return found


def _told(name: str, units: Sequence[tuple[int, ...]], what: str) -> str:
    kind = ("pair of blocks", "pairs of blocks") if len(units[0]) > 1 else ("block", "blocks")
    may_go = " that may go" if len(units[0]) > 1 else ""
    return f"groups: {name} has {len(units)} {kind[len(units) != 1]}{may_go}, and {what}"


def _hint(name: str, count: int, asked: tuple[int, int]) -> str:
    """Return a list of groups that fits, as a recipe has it: what was asked for as often as there is room."""
    kept, size = asked
    whole, rest = divmod(count, size)
    if count == 1:
        return f"with one alone there is no choice; remove other blocks, or leave {name} as it is"
    most = rest if whole else rest - 1  # something has to go
    last = max(1, min(most, round(rest * kept / size)))
    fits = json.dumps([f"{kept}:{size}"] * whole + [f"{last}:{rest}"])
    return f"write a list of groups for {name} that adds up to it, such as {fits}"


def kept_of(
    config: Mapping[str, Any], groups: Sequence[BlockGroup], choices: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Return list -> places that stay, of a choice for every group; blocks of no group stay.

    Args:
        config: of the model.
        groups: from `groups_of`.
        choices: row of `BlockGroup.candidates` for each.
    """
    gone: dict[str, set[int]] = {}
    for group, choice in zip(groups, choices, strict=True):
        gone.setdefault(group.blocks, set()).update(set(group.members) - set(group.places(choice)))
    known = depths(config)
    return {name: tuple(p for p in range(known[name]) if p not in places) for name, places in gone.items()}


def matched(config: Mapping[str, Any], groups: Sequence[BlockGroup]) -> dict[str, list[tuple[int, int]]]:
    """Return list -> (block of the model that is left, block of the original) whose outputs should agree.

    At the end of every group: the last block that stays of it stands for the last block that it had,
    whichever stayed (arXiv 2412.01199, its official code). Groups of which nothing stays have no pair.
    Of a list whose blocks go in pairs, this holds for both halves.

    Args:
        config: of the original.
        groups: from `groups_of`.
    """
    known = depths(config)
    found: dict[str, list[tuple[int, int]]] = {}
    left = {group.blocks: 0 for group in groups}
    for group in groups:
        before = left[group.blocks]
        left[group.blocks] += group.kept
        first_half = [unit[0] for unit in group.units]
        pairs = found.setdefault(group.blocks, [])
        if group.kept:
            pairs.append((left[group.blocks] - 1, first_half[-1]))
        if group.kept and len(group.units[0]) > 1:
            gone = sum(len(one.members) // 2 - one.kept for one in groups if one.blocks == group.blocks)
            shallow = known[group.blocks] - 2 * gone
            pairs.append((shallow - 1 - before, known[group.blocks] - 1 - first_half[0]))
    return {name: sorted(pairs) for name, pairs in found.items()}
