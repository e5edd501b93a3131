"""The points that are tried: how several groups share a budget, and the program solved at each.

`power` solves one program for all groups and sweeps over what the groups' losses weigh; with a single
group there is nothing to sweep over. `mixdq` solves one program per group, as the paper does (arXiv
2405.17873), and sweeps over k = mean bits of the first group / mean bits of the second, in the ranges of
its public code. Two of its details are left out: the average stays what was asked, where the paper also
tries averages up to .3 bits below, and a budget has no lower end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ....errors import PlanError
from ...allocation import Allocation, BudgetUse, allocate, feasible_interval
from ...allocation_forms import group_means
from ...allocation_problem import Budget, InfeasibleBudget, Item
from .problem import Objective, Program, size_of

# Reached by few programs. A limit of nodes, not of time, so that another run finds the same.
_GAP, _NODES, _SECONDS = 1e-5, 50_000, 300.0

_WEIGHT_K, _ACTIVATION_K = (0.46, 1.36), (0.94, 1.09)  # of the paper's code
_LARGEST_FACTOR = 1000.0


@dataclass(frozen=True)
class Point:
    """One way for the groups to share a budget.

    Attributes:
        label: for the report.
        shares: group -> weight of its loss (`power`).
        quotient: k of the paper (`mixdq`, two groups).
    """

    label: str
    shares: Mapping[str, float]
    quotient: float | None = None


def points_of(
    program: Program, objective: Objective, count: int, *, activations: bool = False
) -> list[Point]:
    """Return at most `count` points, the plainest first.

    Args:
        program: its groups decide what there is to sweep over.
        objective: decides how.
        count: 1 or more.
        activations: the paper sweeps over another range for them.

    Raises:
        PlanError: the paper's objective with more than two groups.
    """
    groups = list(program.groups)
    equal = dict.fromkeys(groups, 1.0)
    if len(groups) <= 1:
        return [Point("paper's objective" if objective == "mixdq" else "least sum of powers", equal)]
    if objective == "mixdq":
        return _paper_points(groups, count, _ACTIVATION_K if activations else _WEIGHT_K)
    points = [Point("equal shares", equal)]
    if len(groups) == 2:
        first, factors = groups[0], np.geomspace(1 / _LARGEST_FACTOR, _LARGEST_FACTOR, max(2, count - 1))
        points += [_raised(groups, first, float(factor)) for factor in factors]
    else:
        steps = -(-(count - 1) // len(groups))
        factors = np.geomspace(_LARGEST_FACTOR ** (1 / max(1, steps)), _LARGEST_FACTOR, max(1, steps))
        points += [_raised(groups, group, float(factor)) for factor in factors for group in groups]
    return points[:count]


def sharing(points: list[Point], program: Program, rest: Item, budgets: Sequence[Budget]) -> list[Point]:
    """Return the points; a single one where the budgets are enough for the most bits everywhere.

    Then there is nothing to share, and the paper's quotients would leave a group more than it can use.
    """
    items = [*program.items, rest]
    if all(budget.limit >= feasible_interval(items, [budget])[budget.name].largest for budget in budgets):
        return [Point("the most bits for all", dict.fromkeys(program.groups, 1.0))]
    return points


def _raised(groups: Sequence[str], group: str, factor: float) -> Point:
    return Point(f"{group} x {factor:.3g}", {name: factor if name == group else 1.0 for name in groups})


def _paper_points(groups: Sequence[str], count: int, bounds: tuple[float, float]) -> list[Point]:
    if len(groups) > 2:
        raise PlanError(
            f"objective mixdq shares a budget between two groups at most, not {', '.join(groups)}",
            hint="use the objective power, or join groups",
        )
    first, second = groups
    quotients = np.linspace(*bounds, count) if count > 1 else [1.0]
    return [
        Point(f"paper's objective, {first}/{second} {value:.2f}", {}, float(value)) for value in quotients
    ]


def proof(allocation: Allocation) -> dict[str, Any]:
    """Return an allocation's figures for the report: without every layer's answer, and without times.

    A report is kept beside the weights, and the same run must give the same bytes.
    """
    left_out = ("choices", "layers", "seconds")
    return {key: value for key, value in allocation.to_json().items() if key not in left_out}


def solve(program: Program, rest: Item, budgets: Sequence[Budget], point: Point) -> Allocation:
    """Solve the program at a point.

    Args:
        program: losses and costs of all layers.
        rest: everything else that the budgets are about.
        budgets: all are kept.
        point: how the groups share them.

    Raises:
        InfeasibleBudget: no assignment keeps the budgets, or the paper's split leaves a group too little.
    """
    if point.quotient is None:
        return _allocate([*program.weighted(point.shares), rest], budgets)
    return _solve_apart(program, rest, budgets, point.quotient)


def _allocate(items: Sequence[Item], budgets: Sequence[Budget]) -> Allocation:
    return allocate(items, budgets, mip_rel_gap=_GAP, node_limit=_NODES, time_limit=_SECONDS)


def _solve_apart(program: Program, rest: Item, budgets: Sequence[Budget], quotient: float) -> Allocation:
    """Solve one program per group, each with its part of every budget."""
    first, second = program.groups
    items = {
        group: [item for item in program.items if item.group == group and len(item.choices) > 1]
        for group in (first, second)
    }
    single = [rest, *(item for item in program.items if len(item.choices) == 1)]
    parts: dict[str, list[Budget]] = {first: [], second: []}
    for budget in budgets:
        fixed = sum(item.choices[0].costs[budget.key] for item in single)
        limits = _split(budget, budget.limit - fixed, items[first], items[second], quotient)
        for group, limit in zip((first, second), limits, strict=True):
            parts[group].append(replace(budget, limit=limit))
    solved = [_allocate(items[group], parts[group]) for group in (first, second)]
    return _joined(program, rest, single, budgets, solved)


def _split(
    budget: Budget, limit: int, first: Sequence[Item], second: Sequence[Item], quotient: float
) -> tuple[int, int]:
    """Return the parts of a limit that two groups get."""
    sizes = [sum(map(size_of, items)) for items in (first, second)]
    ranges = []
    for items, size in zip((first, second), sizes, strict=True):
        interval = feasible_interval(items, [budget])[budget.name]
        ranges.append((interval.smallest / size, interval.largest / size))
    means = group_means(
        max(limit, 1) / sum(sizes),
        quotient,
        sizes[0] / sizes[1],
        content_range=ranges[0],
        quality_range=ranges[1],
    )
    if means.outside is not None:
        reason = f"budget {budget.name!r} at k {quotient:.2f}: {means.outside} ({budget.unit} per element)"
        raise InfeasibleBudget(reason, budget=budget, smallest=None, largest=limit)
    part = math.floor(means.content * sizes[0])
    return part, min(limit - part, math.floor(means.quality * sizes[1]) + 1)


def _joined(
    program: Program, rest: Item, single: Sequence[Item], budgets: Sequence[Budget], solved: list[Allocation]
) -> Allocation:
    """Return one allocation for the answers of several programs; their bounds add up."""
    labels = {item.name: item.choices[0].label for item in single}
    for part in solved:
        labels |= part.choices
    items = [*program.items, rest]
    uses = []
    for budget in budgets:
        used = sum(
            choice.costs[budget.key]
            for item in items
            for choice in item.choices
            if choice.label == labels[item.name]
        )
        interval = feasible_interval(items, [budget])[budget.name]
        share = used / budget.limit
        uses.append(
            BudgetUse(
                budget.name, budget.unit, budget.limit, used, share, interval.smallest, interval.largest
            )
        )
    stops = [part.stopped for part in solved]
    return Allocation(
        choices={item.name: labels[item.name] for item in items},
        layers={layer: labels[item.name] for item in items for layer in item.members or (item.name,)},
        loss=math.fsum(part.loss for part in solved),
        lower_bound=math.fsum(part.lower_bound for part in solved),
        best_loss=math.fsum(part.best_loss for part in solved),
        worst_loss=math.fsum(part.worst_loss for part in solved),
        gap=math.fsum(part.gap for part in solved),
        certificate=" and ".join(dict.fromkeys(part.certificate for part in solved)),
        found_by=" and ".join(dict.fromkeys(part.found_by for part in solved)),
        stopped=next((stop for stop in ("limit", "gap") if stop in stops), "optimal"),
        seconds=math.fsum(part.seconds for part in solved),
        budgets=tuple(uses),
    )
