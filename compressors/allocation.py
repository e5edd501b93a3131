"""Allocation: one choice for every layer, the least loss, and no budget exceeded.

Every method that allocates (bits, and whatever else costs bytes or time) states its problem here: items
with choices, each with a measured loss and whole-numbered costs, and budgets. The answer comes with a
proven lower bound, so that its distance from the best possible is known and not assumed.

The program is that of MixDQ (arXiv 2405.17873; its public code), a multiple-choice knapsack: variables
c_ib in {0, 1}, sum_b c_ib = 1. Three things differ from the paper, on purpose:

- It minimises a loss; the paper maximises a sum of scores. The optimum is the same for loss = best score
  - score, but a sum of scores is large and its useful range small, so that a solver's relative gap of
  1e-4 allowed a visible part of that range to be lost.
- A budget has one side, sum_i cost_ib c_ib <= limit. The paper's band (mean +- .02 bits) forbids leaving
  bits unused, which costs time and gains nothing: whatever is left is spent at the end. `allocation_forms`
  has the paper's form.
- All groups may share one program, with several budgets; the paper solves one program per group and
  sweeps over their shares (`allocation_forms.group_means`).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .allocation_bounds import Assignment, affordable, fill, greedy, lagrangian, undecided
from .allocation_highs import solve
from .allocation_problem import (
    Budget,
    Choice,
    InfeasibleBudget,
    Interval,
    Item,
    Named,
    number,
    refuse_alone,
    refuse_together,
)

__all__ = [
    "Allocation",
    "Budget",
    "BudgetUse",
    "Choice",
    "InfeasibleBudget",
    "Interval",
    "Item",
    "allocate",
    "feasible_interval",
]

_ROUNDING = 1e-9  # a gap this small, relative to the loss, is rounding: the assignment is optimal
_CLOSED = 1e-13  # a gap this small is not worth asking HiGHS, whose own tolerances are wider


@dataclass(frozen=True)
class BudgetUse:
    """What an assignment takes of a budget.

    Attributes:
        limit: what was asked.
        used: exact sum of the costs.
        share: used / limit, 0-1.
        smallest: see `Interval`.
        largest: see `Interval`.
    """

    name: str
    unit: str
    limit: int
    used: int
    share: float
    smallest: int
    largest: int


@dataclass(frozen=True)
class Allocation:
    """An assignment, and how good it is known to be.

    Attributes:
        choices: item -> label, in the order in which the items were given.
        layers: layer -> label; an item that several layers share is spread over them.
        loss: sum over the items.
        lower_bound: no assignment within the budgets loses less.
        best_loss: every item at its best choice, whatever it costs ("all-highest").
        worst_loss: every item at its worst choice ("all-lowest").
        gap: loss - lower_bound.
        certificate: what proves the bound, "lagrangian" or "highs".
        found_by: "greedy" or "highs".
        stopped: "optimal" (the gap is rounding), "gap" (as asked) or "limit" (of time or nodes). After a
            limit of time another run may find another assignment; in all other cases it is the same one.
        seconds: wall-clock time of the whole allocation.
        budgets: one per budget, in the order in which they were given.
    """

    choices: dict[str, str]
    layers: dict[str, str]
    loss: float
    lower_bound: float
    best_loss: float
    worst_loss: float
    gap: float
    certificate: str
    found_by: str
    stopped: str
    seconds: float
    budgets: tuple[BudgetUse, ...]

    @property
    def gap_of_range(self) -> float:
        """The gap as a fraction of the range of losses, all-lowest to all-highest."""
        return _quotient(self.gap, self.worst_loss - self.best_loss)

    @property
    def gap_of_loss(self) -> float:
        """The gap as a fraction of the loss above all-highest; the stricter of the two."""
        return _quotient(self.gap, self.loss - self.best_loss)

    def summary(self) -> str:
        """Return a line for the user: loss, bound, gap, and what is used of each budget."""
        state = {
            "optimal": "proven optimal",
            "gap": "within the gap asked for",
            "limit": "stopped at the limit",
        }
        uses = "; ".join(
            f"{use.name}: {use.used:,} of {use.limit:,} {use.unit} ({100 * use.share:.2f} %)"
            for use in self.budgets
        )
        return (
            f"loss {self.loss:.6g}, lower bound {self.lower_bound:.6g} ({self.certificate}), "
            f"gap {self.gap:.2g} ({self.gap_of_range:.1e} of the range), {state[self.stopped]} "
            f"in {self.seconds:.2f} s; {uses}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return every figure as JSON values."""
        gaps = {"gap_of_range": self.gap_of_range, "gap_of_loss": self.gap_of_loss}
        return {**asdict(self), **gaps, "budgets": [asdict(use) for use in self.budgets]}


def _quotient(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def allocate(
    items: Sequence[Item],
    budgets: Sequence[Budget],
    *,
    mip_rel_gap: float = 1e-6,
    time_limit: float = 10.0,
    node_limit: int | None = None,
) -> Allocation:
    """Choose for every item so that the sum of losses is least and every budget is kept.

    A Lagrangian bound and a greedy assignment come first; where their gap is larger than asked, HiGHS
    closes it, and the better assignment is returned. What is left of the budgets is spent on choices with
    an equal or lower loss. Costs are summed in exact integers: a budget is never exceeded by rounding.
    The order of the items, of their choices and of the budgets changes nothing.

    Args:
        items: layers with their choices.
        budgets: one or several.
        mip_rel_gap: stop when loss - bound is at most this fraction of the loss above all-highest; 0 asks for
            a proven optimum.
        time_limit: seconds for HiGHS.
        node_limit: for HiGHS's search tree; unlike a limit of time, it gives the same assignment anywhere.

    Raises:
        PlanError: a loss is not finite, an item has no choices, or a name is wrong; it is named.
        InfeasibleBudget: no assignment keeps the budgets; the message names the smallest that would do.
    """
    if mip_rel_gap < 0 or time_limit <= 0:
        raise ValueError("mip_rel_gap must not be negative and time_limit must be positive")
    began = time.perf_counter()
    named = number(items, budgets)
    problem = named.problem
    for k in range(len(named.budgets)):
        refuse_alone(named, k)
    outcome = _minimise(named, mip_rel_gap, time_limit, node_limit)
    assignment = _settle_ties(named, outcome.assignment)
    loss, spent = problem.loss(assignment), problem.spent(assignment)
    if not problem.permits(assignment):  # cannot happen; a wrong answer would be worse than none
        raise RuntimeError(f"the assignment costs {spent}, the limits are {problem.limits}")
    bound = min(outcome.bound, loss)
    gap, above = loss - bound, loss - problem.best
    labels = {
        item.name: row[j].label for item, row, j in zip(named.items, named.choices, assignment, strict=True)
    }
    uses = {budget.name: _use(named, k, spent[k]) for k, budget in enumerate(named.budgets)}
    return Allocation(
        choices={item.name: labels[item.name] for item in items},
        layers={layer: labels[item.name] for item in items for layer in item.members or (item.name,)},
        loss=loss,
        lower_bound=bound,
        best_loss=problem.best,
        worst_loss=problem.worst,
        gap=gap,
        certificate=outcome.certificate,
        found_by=outcome.found_by,
        stopped="optimal" if gap <= _ROUNDING * above else "gap" if gap <= mip_rel_gap * above else "limit",
        seconds=time.perf_counter() - began,
        budgets=tuple(uses[budget.name] for budget in budgets),
    )


def feasible_interval(items: Sequence[Item], budgets: Sequence[Budget]) -> dict[str, Interval]:
    """Return, for every budget looked at alone, the smallest feasible and the largest useful value.

    Raises:
        PlanError: as `allocate`, but for infeasible budgets.
    """
    named = number(items, budgets)
    found = {budget.name: named.interval(k) for k, budget in enumerate(named.budgets)}
    return {budget.name: found[budget.name] for budget in budgets}


def _use(named: Named, k: int, used: int) -> BudgetUse:
    budget, interval = named.budgets[k], named.interval(k)
    share = used / budget.limit if budget.limit else 1.0
    return BudgetUse(budget.name, budget.unit, budget.limit, used, share, interval.smallest, interval.largest)


@dataclass(frozen=True)
class _Outcome:
    """The best assignment found and the best bound on all of them."""

    assignment: Assignment
    bound: float
    certificate: str
    found_by: str


def _minimise(named: Named, mip_rel_gap: float, time_limit: float, node_limit: int | None) -> _Outcome:
    """Solve the problem: bound, greedy, and HiGHS for what these two leave undecided."""
    full = named.problem
    kept = affordable(full)
    if not all(kept):
        refuse_together(named, time_limit)
    problem = full.only(kept)
    if min(problem.room) < 0:
        refuse_together(named, time_limit)
    dual = lagrangian(problem)
    bound, certificate = problem.best + dual.bound, "lagrangian"
    known, found_by = greedy(problem, dual), "greedy"
    known_loss = problem.loss(known) if known else math.inf
    if known is None or known_loss - bound > max(mip_rel_gap, _CLOSED) * (known_loss - full.best):
        open_choices = (
            undecided(problem, dual, known_loss - problem.best)
            if known
            else [list(range(len(row))) for row in problem.losses]
        )
        core = problem.only(open_choices)
        # HiGHS sees only what is open, and its gap is relative to the loss of that; ours to the whole.
        share = max(bound - full.best, 0.0) / max(known_loss - core.best, 1e-300) if known else 1.0
        gap = mip_rel_gap * min(share, 1e12)
        answer = solve(core, core.excess, mip_rel_gap=gap, time_limit=time_limit, node_limit=node_limit)
        if known is None and answer.assignment is None:
            refuse_together(named, time_limit, proven=answer.stopped == "infeasible")
        # What was closed holds no assignment as good as the known one, so the bound holds for all.
        proven = core.best + answer.bound
        if answer.stopped != "infeasible" and proven > bound:
            bound, certificate = proven, "highs"
        if answer.assignment is not None:
            found = [js[j] for js, j in zip(open_choices, answer.assignment, strict=True)]
            found = fill(problem, found, dual.prices)
            if problem.loss(found) < known_loss:
                known, found_by = found, "highs"
    assert known is not None
    assignment = [js[j] for js, j in zip(kept, known, strict=True)]
    return _Outcome(assignment, bound, certificate, found_by)


def _settle_ties(named: Named, assignment: Assignment) -> Assignment:
    """Deal the choices of items that differ only in name out anew: the dearest to the first name.

    Loss and costs stay as they are. Which of several equal assignments a solver finds first is its own
    affair; which of them is returned should not be.
    """
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, row in enumerate(named.choices):
        labels = tuple(choice.label for choice in row)
        alike[labels, tuple(named.problem.losses[i]), tuple(named.problem.costs[i])].append(i)
    settled = list(assignment)
    for places in alike.values():
        dealt = sorted((assignment[i] for i in places), reverse=True)
        for i, j in zip(places, dealt, strict=True):
            settled[i] = j
    return settled
