"""Who competes with whom, and how many of a scope stay.

A scope is a set of layers whose units (channels, heads, or positions within heads) are ranked together.
The total that stays is exact: int(units before the first step * (1 - share)). Every layer keeps a least
number; what that gives to weak layers is taken from the others, so that the total stays exact, and no
layer falls to nothing or is left whole because all of it lay below a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .heads import best_of
from .widths import Unit

_EXACT = 1e-9  # 10 * (1 - 0.9) is a little less than 1


@dataclass(frozen=True)
class Member:
    """One layer of a scope.

    Attributes:
        group: its name.
        size: units now.
        initial: units before the first step of an iterative schedule.
        floor: units that stay whatever their scores are.
    """

    group: str
    size: int
    initial: int
    floor: int


@dataclass(frozen=True)
class Scope:
    """Layers whose units are ranked together.

    Attributes:
        name: for the user.
        unit: what is counted; of a scope with several kinds that of its first layer.
        setting: the key of `ratios` that its share comes from.
        share: to remove, 0-1, or the proportion that a target scales.
        step: units stay in multiples of this where a layer changes.
        members: in forward order.
        order: [sum of size - floor] int64: which member gets the next unit, best unit first, after all
            floors are filled.
    """

    name: str
    unit: Unit
    setting: str
    share: float
    step: int
    members: tuple[Member, ...]
    order: Tensor

    @property
    def initial(self) -> int:
        """Units before the first step."""
        return sum(member.initial for member in self.members)

    @property
    def least(self) -> int:
        """Units that stay at the highest share."""
        return sum(member.floor for member in self.members)

    @property
    def size(self) -> int:
        """Units now."""
        return sum(member.size for member in self.members)

    def wanted(self, scale: float = 1.0) -> int:
        """Return how many units `share * scale` leaves, were there no floors."""
        return int(self.initial * (1.0 - min(self.share * scale, 1.0)) + _EXACT)

    def total(self, scale: float = 1.0) -> int:
        """Return how many units stay before rounding: `wanted`, but never below the floors."""
        return min(max(self.wanted(scale), self.least), self.size)

    def counts(self, total: int) -> dict[str, int]:
        """Return group -> units that stay when `total` of the scope do, before rounding."""
        extra = torch.bincount(self.order[: total - self.least], minlength=len(self.members))
        return {
            member.group: member.floor + count
            for member, count in zip(self.members, extra.tolist(), strict=True)
        }

    def rounded(self, counts: Mapping[str, int], rounding: Literal["down", "nearest"]) -> dict[str, int]:
        """Bring the units of every layer that changes to a multiple of `step`.

        Args:
            counts: from `counts`.
            rounding: down, or so that the scope's total comes as near as it can: layers with the largest
                rests are rounded up.
        """
        lower = {member.group: _down(counts[member.group], member, self.step) for member in self.members}
        if rounding == "down":
            return lower
        missing = sum(counts.values()) - sum(lower.values())
        upper = {
            member.group: higher
            for member in self.members
            if counts[member.group] != lower[member.group]
            and (higher := next_width(lower[member.group], member, self.step)) is not None
        }
        for name in sorted(
            upper, key=lambda name: lower[name] - counts[name]
        ):  # stable: the largest rest first
            gain = upper[name] - lower[name]
            if 2 * missing >= gain:
                lower[name] = upper[name]
                missing -= gain
        return lower


def _down(count: int, member: Member, step: int) -> int:
    return count if count == member.initial else max(count - count % step, member.floor)


def next_width(count: int, member: Member, step: int) -> int | None:
    """Return the next larger width that a layer may have; None where there is none."""
    higher = count - count % step + step
    if higher <= member.size:
        return higher
    return member.size if count < member.size == member.initial else None


def rank(scope: Scope, scores: Mapping[str, Tensor]) -> Scope:
    """Return the scope with its order from scores: group -> [units now].

    Equal scores are dealt out evenly: those come first that stand higher in their own layer, relative to its
    size; then the first layer. So the same model always gives the same choice.
    """
    values, owners, places = [], [], []
    for place, member in enumerate(scope.members):
        own = scores[member.group].detach().to("cpu", torch.float32)
        free = best_of(own, member.size)[member.floor :]
        values.append(own[free])
        owners.append(torch.full((len(free),), place, dtype=torch.int64))
        places.append(torch.arange(member.floor, member.size, dtype=torch.float64) / member.size)
    even = torch.cat(places).argsort(stable=True)
    best = even[torch.cat(values)[even].argsort(descending=True, stable=True)]
    return replace(scope, order=torch.cat(owners)[best])


def least_units(initial: int, size: int, step: int) -> int:
    """Return how many units of a layer always stay; all of one that is no larger than a step."""
    return size if initial <= step else min(size, max(step, 1))


def stuck(members: Sequence[Member]) -> bool:
    """Tell whether no layer can lose a unit."""
    return all(member.floor >= member.size for member in members)
