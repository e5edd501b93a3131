"""The decision: allocations are solved, tried on the model, and the best measured one is taken.

Sensitivities are measured one layer at a time, and a sum of losses is a prediction. So every distinct
allocation that the sweep gives is installed and measured, on calls that the sensitivities were not
measured on, and so are equal bits for all layers and answers for other budgets. The least measured error
wins: with the objective `power` among all that keep every budget, with `mixdq` among the allocations of
the paper's sweep alone, so that what comes out is the paper's. Weights are decided first,
with activations in floating point, then activations with these weights; the errors of the two phases
are measured under different conditions and never compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....calibration.sensitivity_table import Table
from ....errors import PlanError
from ....progress import Progress, step
from ....recipes.allocation import AllocationSettings
from ...allocation import Allocation
from ...allocation_problem import Budget, InfeasibleBudget, Item
from .activations import decide_activations
from .budgets import check_budget, plan_assignment
from .decision_report import describe
from .problem import REST, Assignment, Program, rest_item, weight_budgets, weight_program
from .sweep import Point, points_of, sharing, solve
from .trying import Score, Trial, curve, uniform

if TYPE_CHECKING:
    from .candidates import LayerChoices

__all__ = ["Decision", "Score", "check_budget", "decide", "plan_assignment"]


@dataclass(frozen=True)
class Decision:
    """What every layer gets, and why.

    Attributes:
        assignment: bits of all weights and activations.
        allocation: the best measured one of the program's answers for the weights, with its bound; it names
            `problem.REST` too. Where another allocation measured better, `assignment` is that one.
        details: for the report, JSON values.
    """

    assignment: Assignment
    allocation: Allocation
    details: dict[str, Any] = field(default_factory=dict)


def decide(
    choices: Sequence[LayerChoices],
    table: Table,
    settings: AllocationSettings,
    *,
    fixed_bytes: int,
    original_bytes: int,
    score: Score,
    progress: Progress,
) -> Decision:
    """Choose the bits of every layer.

    Args:
        choices: of all layers; one entry for tied copies.
        table: sensitivities of the weights at every offered number of bits but 16, and of the
            activations where there is a choice.
        settings: budget, objective, groups.
        fixed_bytes: of all tensors that are not allocated.
        original_bytes: of all tensors of the model before the stage.
        score: measures the relative error power under an assignment, on calls that the table was not
            measured on; an activation of 16 bits is left as it is.
        progress: gets one step for the weights, and one for activations where several are tried.

    Raises:
        PlanError: the budget cannot be kept (`InfeasibleBudget`).
        StageError: a sensitivity is missing, or something measured is not finite.
    """
    check_budget(choices, settings, fixed_bytes, original_bytes, measured=True)
    program = weight_program(choices, table, settings.objective)
    rest = rest_item(fixed_bytes)
    budgets = weight_budgets(choices, settings.budget, original_bytes)
    solved, skipped = _solved(program, rest, budgets, settings)
    others = _others(choices, program, rest, solved[0][0])
    trial = Trial(choices, fixed_bytes, score, budgets, only_asked=settings.objective == "mixdq")
    with step(progress, "try allocations", len(solved) + len(others)):
        for point, allocation in solved:
            trial.measure(point.label, allocation.choices, allocation, asked=True)
            progress.advance(1, point.label)
        for label, labels, allocation_ in others:
            trial.measure(label, labels, allocation_, asked=False)
            progress.advance(1, label)
    chosen, best = trial.best(), trial.best_answer()
    assert best.allocation is not None
    activations = decide_activations(choices, table, settings, chosen.weights, score, progress)
    assignment = Assignment(chosen.weights, activations.bits)
    tried, error = list(trial.tried.values()), score(assignment)
    details = describe(choices, table, settings, program, chosen, best, tried, assignment, error)
    details["skipped"] = skipped
    if activations.details:
        details["activations"] = activations.details
    return Decision(assignment, best.allocation, details)


def _solved(
    program: Program, rest: Item, budgets: Sequence[Budget], settings: AllocationSettings
) -> tuple[list[tuple[Point, Allocation]], list[str]]:
    """Solve every point of the sweep; say which ones the paper would skip.

    Raises:
        PlanError: none can be solved.
    """
    points = points_of(program, settings.objective, settings.points)
    solved, skipped = [], []
    for point in sharing(points, program, rest, budgets):
        try:
            solved.append((point, solve(program, rest, budgets, point)))
        except InfeasibleBudget as error:
            skipped.append(str(error))
    if not solved:
        raise PlanError(
            f"no split of the budget between the groups {' and '.join(program.groups)} can be kept;"
            f" {skipped[0]}",
            hint="ask for another budget, raise `points`, or use the objective power",
        )
    return solved, skipped


def _others(
    choices: Sequence[LayerChoices], program: Program, rest: Item, point: Point
) -> list[tuple[str, dict[str, str], Allocation | None]]:
    """Return what is measured to be compared with: equal bits for all, and other budgets."""
    found: list[tuple[str, dict[str, str], Allocation | None]] = [
        (f"all {label}", labels, None) for label, labels in uniform(choices).items()
    ]
    for allocation in curve(program, rest, point):
        labels = {name: label for name, label in allocation.choices.items() if name != REST}
        found.append(("other budget", labels, allocation))
    return found
