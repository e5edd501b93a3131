"""Allocations that are tried on the model: each distinct one is measured once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....errors import StageError
from ....recipes.allocation import FLOAT_BITS
from ...allocation import Allocation, feasible_interval
from ...allocation_problem import Budget, InfeasibleBudget, Item
from .activations import in_floating_point
from .offers import FLOAT_LABEL, nominal_bits
from .problem import (
    REST,
    Assignment,
    Program,
    bytes_budget,
    has_choice,
    mean_bits,
    spent,
    spread,
    stored_bytes,
)
from .sweep import Point, solve

if TYPE_CHECKING:
    from .candidates import LayerChoices

_CURVE_POINTS = 8

Score = Callable[[Assignment], float]
"""Returns the error power of the model's output relative to the output's, under an assignment."""


@dataclass(frozen=True)
class Tried:
    """An allocation of the weights, and how the model computes with it.

    Attributes:
        label: which point of the sweep, or what else.
        weights: layer -> label.
        bytes: of all tensors of the model.
        mean_bits: nominal, of the layers that have a choice.
        error: measured error power / power of the output, activations in floating point.
        allocation: the program's answer; None where none was solved.
        asked: the program's answer for the budget that was asked; others are there to compare with.
        eligible: may be taken; it keeps every budget.
    """

    label: str
    weights: Mapping[str, str]
    bytes: int
    mean_bits: float
    error: float
    allocation: Allocation | None
    asked: bool
    eligible: bool


class Trial:
    """Measures allocations, each distinct one once.

    Args:
        choices: of all layers.
        fixed_bytes: of all tensors that are not allocated.
        score: measures an assignment.
        budgets: that are to be kept.
        only_asked: take nothing but the program's own answers for these budgets.
    """

    def __init__(
        self,
        choices: Sequence[LayerChoices],
        fixed_bytes: int,
        score: Score,
        budgets: Sequence[Budget],
        *,
        only_asked: bool,
    ) -> None:
        self._choices, self._fixed_bytes, self._score = choices, fixed_bytes, score
        self._budgets, self._only_asked = budgets, only_asked
        self._floating = in_floating_point(choices)
        self.tried: dict[tuple[str, ...], Tried] = {}

    def measure(
        self, label: str, chosen: Mapping[str, str], allocation: Allocation | None, *, asked: bool
    ) -> Tried:
        """Return what an assignment measures; the first label of an assignment stays.

        Args:
            label: for the report.
            chosen: item -> label of its weight's bits.
            allocation: the program's answer.
            asked: see `Tried`.

        Raises:
            StageError: the error is not finite.
        """
        weights = spread(self._choices, chosen)
        key = tuple(weights.values())
        if key not in self.tried:
            error = self._score(Assignment(weights, self._floating))
            if not (math.isfinite(error) and error >= 0):
                raise StageError(f"the model's error under the allocation {label!r} is {error}")
            size = self._fixed_bytes + stored_bytes(self._choices, weights)
            average = mean_bits(self._choices, weights)
            eligible = asked or (not self._only_asked and self._keeps(weights))
            self.tried[key] = Tried(label, weights, size, average, error, allocation, asked, eligible)
        return self.tried[key]

    def best(self) -> Tried:
        """Return the eligible one with the least error, the first of equal ones."""
        return min((item for item in self.tried.values() if item.eligible), key=lambda item: item.error)

    def best_answer(self) -> Tried:
        """Return the one with the least error among the program's answers for the budget asked."""
        return min((item for item in self.tried.values() if item.asked), key=lambda item: item.error)

    def _keeps(self, weights: Mapping[str, str]) -> bool:
        return all(
            spent(budget, self._choices, weights, self._fixed_bytes) <= budget.limit
            for budget in self._budgets
        )


def uniform(choices: Sequence[LayerChoices]) -> dict[str, dict[str, str]]:
    """Return the assignments with one label for all layers that have a choice, floating point aside."""
    open_ = [entry for entry in choices if has_choice(entry)]
    common = set.intersection(*(set(entry.costs) for entry in open_)) - {FLOAT_LABEL}
    return {
        label: {entry.site.name: label if has_choice(entry) else next(iter(entry.costs)) for entry in choices}
        for label in sorted(common, key=nominal_bits)
    }


def curve(program: Program, rest: Item, point: Point) -> list[Allocation]:
    """Solve for other budgets, from the fewest bits to the most below floating point.

    Args:
        program: of the weights.
        rest: everything else.
        point: how groups share a budget.
    """
    items = [*program.items, rest]
    least = feasible_interval(items, [bytes_budget(0)])["bytes"].smallest
    most = sum(
        max(choice.costs["bytes"] for choice in item.choices if not _floats(item, choice.label))
        for item in items
    )
    found = []
    for limit in np.geomspace(least, most, _CURVE_POINTS):
        try:
            found.append(solve(program, rest, [bytes_budget(math.ceil(limit))], point))
        except InfeasibleBudget:
            continue  # the paper's split of this budget leaves a group less than its fewest bits
    return found


def _floats(item: Item, label: str) -> bool:
    """Tell whether a label is floating point among others that are not."""
    return item.name != REST and len(item.choices) > 1 and nominal_bits(label) == FLOAT_BITS
