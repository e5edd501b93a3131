"""Can the budget be kept at all? Answered from shapes alone, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ....errors import PlanError
from ....recipes.allocation import FLOAT_BITS, AllocationSettings
from ...allocation import allocate, feasible_interval
from ...allocation_problem import Budget, InfeasibleBudget, Interval, Item
from .offers import FLOAT_LABEL
from .problem import (
    REST,
    Assignment,
    allocated_weights,
    has_choice,
    nominal_program,
    rest_item,
    spread,
    weight_budgets,
)
from .sweep import points_of

if TYPE_CHECKING:
    from .candidates import LayerChoices

_NAMES_SHOWN = 3


def check_budget(
    choices: Sequence[LayerChoices],
    settings: AllocationSettings,
    fixed_bytes: int,
    original_bytes: int,
    *,
    measured: bool = False,
) -> None:
    """Refuse a budget that no assignment keeps, or that even the most bits do not use.

    What is planned counts transforms that data may do without: then everything takes a few bytes less. So
    a budget that was accepted by the plan may be too large later, and is refused no more.

    Args:
        choices: of all layers.
        settings: budget, objective and groups.
        fixed_bytes: of all tensors that are not allocated.
        original_bytes: of all tensors of the model before the stage.
        measured: everything was measured by now; one that is too large is kept by the most bits.

    Raises:
        InfeasibleBudget: the budget is too small; the message names the smallest that would do.
        PlanError: it is larger than every layer at its most bits, nothing is to be chosen, the objective
            does not fit the groups, or see `check_activation_budget`.
    """
    if not any(has_choice(entry) for entry in choices):
        raise PlanError(
            "there is nothing to allocate: every layer has one choice of bits only",
            hint="offer more `bits`, or fix fewer layers",
        )
    program = nominal_program(choices)
    items = [*program.items, rest_item(fixed_bytes)]
    budgets = weight_budgets(choices, settings.budget, original_bytes)
    units = {"mean_bits": allocated_weights(choices), "bytes": 1, "ratio": original_bytes}
    for budget in budgets:
        interval = feasible_interval(items, [budget])[budget.name]
        if measured and budget.limit > interval.largest:
            continue
        _check(budget, interval, units[budget.name], items)
    if len(budgets) > 1:
        allocate(items, budgets)  # refuses those that cannot be kept together
    points_of(program, settings.objective, settings.points)
    if not measured:
        check_activation_budget(choices, settings)


def check_activation_budget(choices: Sequence[LayerChoices], settings: AllocationSettings) -> None:
    """Refuse an average of the inputs' bits that no assignment keeps, or that the most bits do not use.

    Args:
        choices: of all layers. As long as it is not known how large inputs are, what no sizes could make
            possible is refused.
        settings: the budget of activations; without an average there is nothing to check.

    Raises:
        PlanError: stating from which to which average can be asked.
    """
    budget = settings.activation_budget
    open_ = [entry for entry in choices if len(entry.activations) > 1]
    if budget is None or budget.mean_bits is None or not open_:
        return
    low, high = ([pick(entry.activations) for entry in open_] for pick in (min, max))
    smallest, largest = float(min(low)), float(max(high))
    sizes = [entry.inputs for entry in open_]
    if all(sizes):
        smallest, largest = (
            sum(bits * size for bits, size in zip(side, sizes, strict=True)) / sum(sizes)
            for side in (low, high)
        )
    if not smallest <= budget.mean_bits <= largest:
        raise PlanError(
            f"activation_budget.mean_bits: {budget.mean_bits:g} bits cannot be kept or used;"
            f" from {smallest:.4g} to {largest:.4g} bits can be asked of the inputs that have a choice",
            hint="ask for another average, or offer other `activation_bits`",
        )


def _check(budget: Budget, interval: Interval, unit: int, items: Sequence[Item]) -> None:
    asked, smallest, largest = (
        _shown(budget.name, value, unit) for value in (budget.limit, interval.smallest, interval.largest)
    )
    between = f"from {smallest} to {largest} can be asked"
    where = f"budget.{budget.name}: {asked}"
    if budget.limit > interval.largest:
        raise PlanError(
            f"{where} is more than every layer takes at the most bits offered; {between}",
            hint="ask for less, or offer more `bits`",
        )
    if budget.limit >= interval.smallest:
        return
    text = f"{where} is less than every layer takes at the fewest bits offered; {between}"
    fixed = sorted(
        ((item.choices[0].costs[budget.key], item.name) for item in items if len(item.choices) == 1),
        key=lambda pair: (-pair[0], pair[1]),
    )
    if interval.fixed > budget.limit:
        names = ", ".join(name for _, name in fixed[:_NAMES_SHOWN])
        text += f"; what is fixed takes {_shown(budget.name, interval.fixed, unit)} by itself ({names}"
        text += ", ...)" if len(fixed) > _NAMES_SHOWN else ")"
    raise InfeasibleBudget(
        text,
        budget=budget,
        smallest=interval.smallest,
        largest=interval.largest,
        hint="ask for more, offer fewer `bits`, or leave fewer layers out",
    )


def _shown(name: str, value: int, unit: int) -> str:
    """Return a value of a budget in the unit in which it is asked."""
    if name == "bytes":
        return f"{value:,} bytes"
    if name == "mean_bits":
        return f"{value / unit:.4g} bits"
    return f"{value / unit:.4g} ({value:,} of {unit:,} bytes)"


def plan_assignment(
    choices: Sequence[LayerChoices],
    settings: AllocationSettings,
    fixed_bytes: int,
    original_bytes: int,
) -> Assignment:
    """Return an assignment within the budget that uses it as far as possible, before anything is measured.

    What a plan can know: bytes and averages will be those; which layer gets which bits will be another.

    Raises:
        PlanError: see `check_budget`.
    """
    check_budget(choices, settings, fixed_bytes, original_bytes)
    budgets = weight_budgets(choices, settings.budget, original_bytes)
    found = allocate([*nominal_program(choices).items, rest_item(fixed_bytes)], budgets)
    weights = spread(choices, {name: label for name, label in found.choices.items() if name != REST})
    activations = {
        name: FLOAT_BITS if label == FLOAT_LABEL else min(offered)
        for entry in choices
        for offered in [entry.activations or (FLOAT_BITS,)]
        for name, label in ((name, weights[name]) for name in entry.names)
    }
    return Assignment(weights, activations)
