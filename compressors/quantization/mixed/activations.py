"""Bits of the activations, decided when those of the weights are: a share to protect, or an average."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....calibration.sensitivity_table import Table
from ....errors import PlanError
from ....progress import Progress, step
from ....recipes.allocation import FLOAT_BITS, AllocationSettings
from ...allocation import Allocation
from ...allocation_problem import Choice, InfeasibleBudget, Item
from .offers import FLOAT_LABEL, nominal_bits
from .problem import Assignment, activation_budget, activation_program
from .sweep import points_of, proof, sharing, solve

if TYPE_CHECKING:
    from .candidates import LayerChoices


@dataclass(frozen=True)
class ActivationDecision:
    """Bits of every input, and what is told about them.

    Attributes:
        bits: layer -> bits; 16 is floating point.
        details: JSON values; empty where there was nothing to decide.
    """

    bits: Mapping[str, int]
    details: dict[str, Any] = field(default_factory=dict)


def in_floating_point(choices: Sequence[LayerChoices]) -> dict[str, int]:
    """Return what the weights are decided under: no input is quantized."""
    return {name: FLOAT_BITS for entry in choices for name in entry.names}


def decide_activations(
    choices: Sequence[LayerChoices],
    table: Table,
    settings: AllocationSettings,
    weights: Mapping[str, str],
    score: Callable[[Assignment], float],
    progress: Progress,
) -> ActivationDecision:
    """Decide the bits of every input.

    Inputs of layers whose weights stay in floating point do so too.

    Args:
        choices: of all layers.
        table: with rows of activations, where there is a choice.
        settings: what was asked.
        weights: layer -> label, decided before.
        score: measures an assignment; its figures are compared among themselves only.
        progress: gets one step where several allocations are tried.

    Raises:
        StageError: a sensitivity is missing.
        PlanError: the budget cannot be kept.
    """
    quantized = [
        entry for entry in choices if weights[entry.site.name] != FLOAT_LABEL and len(entry.activations) > 0
    ]
    bits = in_floating_point(choices)
    bits |= {
        name: entry.activations[0]
        for entry in quantized
        if len(entry.activations) == 1
        for name in entry.names
    }
    open_ = [entry for entry in quantized if len(entry.activations) > 1]
    budget = settings.activation_budget
    if not open_ or budget is None:
        return ActivationDecision(bits)
    if budget.protect is not None:
        return _protect(open_, table, settings, budget.protect, bits)
    assert budget.mean_bits is not None
    return _average(open_, table, settings, budget.mean_bits, weights, bits, score, progress)


def _protect(
    entries: Sequence[LayerChoices],
    table: Table,
    settings: AllocationSettings,
    share: float,
    bits: dict[str, int],
) -> ActivationDecision:
    """Leave the inputs that lose most in floating point: a share of the layers by count, rounded up.

    Under both objectives by the loss that was measured: decibels below the layer's own best say nothing
    about which layer suffers most.
    """
    program = activation_program(entries, table, "power")
    count = math.ceil(share * len(entries) - 1e-9)
    equal = dict.fromkeys(program.groups, 1.0)
    losses = {item.name: max(choice.loss for choice in item.choices) for item in program.weighted(equal)}
    order = sorted(losses, key=lambda name: -losses[name])  # stable: of equal ones the first in the model
    protected = set(order[:count])
    for entry in entries:
        chosen = FLOAT_BITS if entry.site.name in protected else min(entry.activations)
        bits |= dict.fromkeys(entry.names, chosen)
    listed = [entry.site.name for entry in entries if entry.site.name in protected]
    return ActivationDecision(bits, {"rule": "protect", "share_asked": share, "protected": listed})


def _average(
    entries: Sequence[LayerChoices],
    table: Table,
    settings: AllocationSettings,
    mean: float,
    weights: Mapping[str, str],
    bits: dict[str, int],
    score: Callable[[Assignment], float],
    progress: Progress,
) -> ActivationDecision:
    """Solve the program of the activations and take what measures best."""
    program = activation_program(entries, table, settings.objective)
    budget = activation_budget(entries, mean)
    rest = Item("nothing", (Choice("", 0.0, {budget.key: 0}),))
    solved: dict[tuple[tuple[str, int], ...], tuple[str, Allocation]] = {}
    skipped = []
    points = points_of(program, settings.objective, settings.points, activations=True)
    for point in sharing(points, program, rest, [budget]):
        try:
            found = solve(program, rest, [budget], point)
        except InfeasibleBudget as error:
            skipped.append(str(error))
            continue
        labels = [(entry, nominal_bits(found.choices[entry.site.name])) for entry in entries]
        chosen = {name: value for entry, value in labels for name in entry.names}
        solved.setdefault(tuple(sorted(chosen.items())), (point.label, found))
    if not solved:
        raise PlanError(
            f"activation_budget.mean_bits: {mean:g} cannot be kept: {skipped[0]}",
            hint="ask for more bits, or offer fewer",
        )
    tried = []
    with step(progress, "try activation bits", len(solved)):
        for chosen_bits, (label, found) in solved.items():
            measured = score(Assignment(weights, {**bits, **dict(chosen_bits)}))
            tried.append((measured, label, dict(chosen_bits), found))
            progress.advance(1, label)
    _, label, best, found = min(tried, key=lambda entry: entry[0])
    return ActivationDecision(
        {**bits, **best},
        {
            "rule": "mean_bits",
            "mean_bits_asked": mean,
            "mean_bits": found.budgets[0].used / max(1, sum(entry.inputs for entry in entries)),
            "chosen": label,
            "tried": [{"label": entry[1], "error": entry[0]} for entry in tried],
            "skipped": skipped,
            "bound": proof(found),
        },
    )
