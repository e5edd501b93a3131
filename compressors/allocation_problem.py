"""What an allocation is stated in: items with choices, and budgets.

They are checked and numbered here, and refused with the feasible values where no assignment exists.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from ..errors import PlanError
from .allocation_bounds import Problem
from .allocation_highs import solve

_LARGEST_LOSS = 1e100  # sums and products of losses stay finite
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Choice:
    """One way to treat an item.

    Attributes:
        label: unique within the item, as "w4" or "rank 64".
        loss: finite; any unit, the same for all items. Losses are added up.
        costs: key of a budget's cost -> whole number of its unit, not negative.
    """

    label: str
    loss: float
    costs: Mapping[str, int]


@dataclass(frozen=True)
class Item:
    """A layer, or several that must take the same choice (`allocation_forms.share_choice`).

    Attributes:
        name: unique among the items.
        choices: one or more; an item with one choice is fixed.
        group: for budgets that cover only some groups; None belongs to none.
        members: names of the layers that the choice is for; empty means the item itself.
    """

    name: str
    choices: tuple[Choice, ...]
    group: str | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """The most that the items may cost together.

    Attributes:
        name: for messages and the report.
        limit: whole number of units.
        cost: key in `Choice.costs`; None means the budget's name.
        groups: the groups it covers; None covers every item.
        at_least: 0, or the lower end of a two-sided budget (the paper's band).
        unit: for messages.
    """

    name: str
    limit: int
    cost: str | None = None
    groups: tuple[str, ...] | None = None
    at_least: int = 0
    unit: str = "bytes"

    @property
    def key(self) -> str:
        """Key of this budget in `Choice.costs`."""
        return self.name if self.cost is None else self.cost

    def covers(self, item: Item) -> bool:
        """Return whether the item's cost counts."""
        return self.groups is None or item.group in self.groups


class InfeasibleBudget(PlanError):
    """No assignment keeps the budgets.

    Attributes:
        budget: name of the budget that would have to change; the first of them where several could.
        asked: its limit.
        smallest: the least it would have to be with the others as they are; None where no value of this
            budget alone is enough.
        largest: more than this is of no use: every item would be at its best choice.
    """

    def __init__(
        self, message: str, *, budget: Budget, smallest: int | None, largest: int, hint: str | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.budget, self.asked = budget.name, budget.limit
        self.smallest, self.largest = smallest, largest


@dataclass(frozen=True)
class Interval:
    """What a budget can be, looked at alone, in its unit.

    Attributes:
        smallest: every covered item at its cheapest choice.
        largest: every covered item at its best choice; more is of no use.
        fixed: what the items with a single choice take of it.
    """

    smallest: int
    largest: int
    fixed: int


@dataclass(frozen=True)
class Named:
    """A problem and the names of its numbers.

    Items, choices and budgets are in an order of their own (by name, by cost), so that the order in
    which they are given decides nothing.
    """

    items: list[Item]
    choices: list[list[Choice]]
    budgets: list[Budget]
    problem: Problem

    def interval(self, k: int) -> Interval:
        """Return what budget `k` can be."""
        smallest = largest = fixed = 0
        for losses, costs in zip(self.problem.losses, self.problem.costs, strict=True):
            best = min(losses)
            smallest += min(cost[k] for cost in costs)
            # Of equally good choices the dearest: it is taken where there is room.
            largest += max(cost[k] for loss, cost in zip(losses, costs, strict=True) if loss == best)
            fixed += costs[0][k] if len(costs) == 1 else 0
        return Interval(smallest, largest, fixed)


def number(items: Sequence[Item], budgets: Sequence[Budget]) -> Named:
    """Check and number the items, their choices and the budgets.

    Raises:
        PlanError: what is wrong, by name.
    """
    if not items:
        raise PlanError("there is nothing to allocate: no items")
    if not budgets:
        raise PlanError("there is no budget to allocate under")
    _unique("item", [item.name for item in items])
    _unique("layer", [layer for item in items for layer in item.members or (item.name,)])
    _unique("budget", [budget.name for budget in budgets])
    groups = {item.group for item in items}
    for budget in budgets:
        for group in budget.groups or ():
            if group not in groups:
                raise PlanError(f"budget {budget.name!r} covers group {group!r}, which no item is in")
    ordered = sorted(budgets, key=lambda budget: budget.name)
    limits = tuple(_whole(budget.limit, f"budget {budget.name!r}: its limit") for budget in ordered)
    floors = tuple(_whole(budget.at_least, f"budget {budget.name!r}: its lower end") for budget in ordered)
    chosen, losses, costs = [], [], []
    rows = sorted(items, key=lambda item: item.name)
    for item in rows:
        row = sorted(
            (
                (_costs(item, choice, ordered), _loss(item, choice), choice.label, choice)
                for choice in item.choices
            ),
            key=operator.itemgetter(0, 1, 2),
        )
        if not row:
            raise PlanError(f"{item.name}: it has no choices", hint="give every item one choice or more")
        _unique(f"choice of {item.name}", [label for _, _, label, _ in row])
        costs.append([entry[0] for entry in row])
        losses.append([entry[1] for entry in row])
        chosen.append([entry[3] for entry in row])
    return Named(rows, chosen, ordered, Problem(losses, costs, limits, floors))


def _unique(kind: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PlanError(f"{kind} {name!r} is given twice")
        seen.add(name)


def _whole(value: int, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise PlanError(f"{what} must be a whole number, not {value!r}") from None


def _loss(item: Item, choice: Choice) -> float:
    loss = float(choice.loss)
    if not math.isfinite(loss) or abs(loss) > _LARGEST_LOSS:
        raise PlanError(
            f"{item.name}: the loss of choice {choice.label!r} is {loss}, not a finite number",
            hint="measure this layer's sensitivity again, or take the choice away",
        )
    return loss


def _costs(item: Item, choice: Choice, budgets: Sequence[Budget]) -> tuple[int, ...]:
    """Return the cost of a choice for every budget, 0 where the budget does not cover the item."""
    costs = []
    for budget in budgets:
        if not budget.covers(item):
            costs.append(0)
            continue
        where = f"{item.name}: the cost of choice {choice.label!r} for budget {budget.name!r}"
        if budget.key not in choice.costs:
            raise PlanError(f"{where} is not given (key {budget.key!r})")
        cost = _whole(choice.costs[budget.key], where)
        if cost < 0:
            raise PlanError(f"{where} is negative: {cost}")
        costs.append(cost)
    return tuple(costs)


def refuse_alone(named: Named, k: int) -> None:
    """Refuse budget `k` if it is infeasible whatever the other budgets are.

    Raises:
        InfeasibleBudget: it is.
    """
    budget, interval, problem = named.budgets[k], named.interval(k), named.problem
    most = sum(max(cost[k] for cost in costs) for costs in problem.costs)
    error = _infeasible(budget, interval.smallest, interval.largest)
    if budget.at_least > budget.limit:
        raise error(f"its lower end {budget.at_least:,} is above its limit {budget.limit:,}")
    if budget.at_least > most:
        raise error(
            f"at least {budget.at_least:,} {budget.unit} asked, but all items at their dearest take {most:,}",
            hint=f"ask for {interval.largest:,} or less",
        )
    if budget.limit >= interval.smallest:
        return
    text = (
        f"{budget.limit:,} {budget.unit} asked, but the smallest feasible is {interval.smallest:,} "
        f"(every item at its cheapest choice); more than {interval.largest:,} is of no use"
    )
    hint = f"ask for {interval.smallest:,} {budget.unit} or more, or offer cheaper choices"
    if interval.fixed > budget.limit:
        costs = {
            item.name: row[0][k]
            for item, row in zip(named.items, problem.costs, strict=True)
            if len(row) == 1 and row[0][k]
        }
        largest = sorted(costs, key=lambda name: (-costs[name], name))[:_NAMES_SHOWN]
        share = f", {100 * interval.fixed / budget.limit:.1f} % of it" if budget.limit > 0 else ""
        text += (
            f"; its {len(costs)} fixed items alone take {interval.fixed:,}{share} "
            f"({', '.join(largest)}{', ...' if len(costs) > len(largest) else ''})"
        )
        hint = "give fixed items further choices, or " + hint
    raise error(text, hint=hint)


def refuse_together(named: Named, time_limit: float, *, proven: bool = True) -> NoReturn:
    """Refuse budgets that no assignment keeps together, or within their two ends.

    Says for every budget what it would have to be with the others as they are: the program is solved
    once more for each, with that budget's cost as what is minimised.

    Args:
        named: the problem.
        time_limit: seconds for each of these programs.
        proven: False where the solver ran out of time before it found or excluded an assignment.

    Raises:
        InfeasibleBudget: there is none.
        PlanError: the time was not enough to tell.
    """
    least = [_least_alone(named, k, time_limit) for k in range(len(named.budgets))]
    needs = [need for need, _ in least]
    # A budget that is proven to need more than it may have excludes every assignment.
    excluded = any(
        exact and (need is None or need > budget.limit)
        for budget, (need, exact) in zip(named.budgets, least, strict=True)
    )
    if not proven and not excluded:
        raise PlanError(
            f"in {time_limit:g} s no assignment within the budgets was found, and none excluded",
            hint="raise the time limit, or widen the budgets",
        )
    able = [k for k, need in enumerate(needs) if need is not None]
    first = able[0] if able else 0
    budget = named.budgets[first]
    parts = [
        f"{other.name!r} {other.limit:,} {other.unit} asked, "
        + (
            f"smallest with the others as they are {'' if exact else 'at most '}{need:,}"
            if need is not None
            else "not enough by itself"
        )
        for other, (need, exact) in zip(named.budgets, least, strict=True)
    ]
    if len(parts) == 1:
        text = f"no assignment costs between {budget.at_least:,} and {budget.limit:,} {budget.unit}; "
        text += f"the next above costs {needs[0]:,}" if able else "nor any above"
    else:
        text = "no assignment keeps the budgets together: " + "; ".join(parts)
    hint = (
        f"raise budget {budget.name!r} to {needs[first]:,} {budget.unit} or more"
        if able
        else "raise more than one of the budgets"
    )
    largest = named.interval(first).largest
    raise _infeasible(budget, needs[first], largest)(text, hint=hint)


def _least_alone(named: Named, k: int, time_limit: float) -> tuple[int | None, bool]:
    """Return the least that budget `k` must allow while the others stay, and whether that is proven.

    None where no value of this budget is enough.
    """
    problem = named.problem
    most = sum(max(cost[k] for cost in costs) for costs in problem.costs)
    freed = replace(problem, limits=(*problem.limits[:k], most, *problem.limits[k + 1 :]))
    if any(room < 0 for room in freed.room):
        return None, True
    answer = solve(freed, freed.weight[k], mip_rel_gap=0.0, time_limit=time_limit)
    needed = problem.spent(answer.assignment)[k] if answer.assignment is not None else None
    return needed, answer.stopped in ("optimal", "infeasible")


def _infeasible(budget: Budget, smallest: int | None, largest: int) -> Callable[..., InfeasibleBudget]:
    """Return what makes the error of a budget from its text and hint."""

    def error(text: str, hint: str | None = None) -> InfeasibleBudget:
        return InfeasibleBudget(
            f"budget {budget.name!r}: {text}", budget=budget, smallest=smallest, largest=largest, hint=hint
        )

    return error
