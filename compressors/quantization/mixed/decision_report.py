"""What a decision tells: budget asked and used, groups, bound, points tried, and every layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ....calibration.sensitivity_table import Table
from ....calibration.similarity import decibels
from ....recipes.allocation import FLOAT_BITS, AllocationSettings
from ...allocation import Allocation
from .offers import nominal_bits
from .problem import Assignment, Program, allocated_weights, has_choice, mean_bits, stored_bytes
from .sweep import proof
from .trying import Tried

if TYPE_CHECKING:
    from .candidates import LayerChoices

OBJECTIVES = {"power": "least error power", "mixdq": "mixdq objective (paper)"}
"""How objectives are called wherever they are shown."""

CHOSEN_AMONG = {
    "power": "all measured allocations that keep the budget",
    "mixdq": "the allocations of the paper's sweep",
}
"""What the least measured error is looked for in."""


def predicted_error(
    choices: Sequence[LayerChoices], table: Table, weights: Mapping[str, str]
) -> float | None:
    """Return the sum of the layers' measured error powers; None where a layer was measured otherwise."""
    total = []
    for entry in choices:
        row = table.at("weight", entry.site.name, weights[entry.site.name])
        if row is not None and row.metric != "sqnr_db":
            return None
        total.append(row.loss if row is not None else 0.0)
    return math.fsum(total)


def describe(
    choices: Sequence[LayerChoices],
    table: Table,
    settings: AllocationSettings,
    program: Program,
    chosen: Tried,
    solved: Tried,
    tried: Sequence[Tried],
    assignment: Assignment,
    final_error: float,
) -> dict[str, Any]:
    """Return the report of a decision as JSON values.

    Args:
        choices: of all layers.
        table: of sensitivities.
        settings: what was asked.
        program: of the weights.
        chosen: what was taken.
        solved: the best measured one of the program's answers for the budget: `chosen` itself, most often.
        tried: all that was measured, `chosen` included.
        assignment: weights and activations.
        final_error: measured with both.
    """
    assert solved.allocation is not None
    predicted = predicted_error(choices, table, chosen.weights)
    return {
        "objective": settings.objective,
        "objective_label": OBJECTIVES[settings.objective],
        "asked": settings.budget.model_dump(exclude_none=True),
        "used": _used(choices, chosen, solved.allocation),
        "groups": _groups(choices, program, chosen.weights),
        "chosen": chosen.label,
        "chosen_among": CHOSEN_AMONG[settings.objective],
        "bound": {"point": solved.label, **proof(solved.allocation)},
        "measured": {
            "weights_sqnr_db": _decibels(chosen.error),
            "predicted_weights_sqnr_db": None if predicted is None else _decibels(predicted),
            "sqnr_db": _decibels(final_error),
        },
        "points": _points(choices, table, chosen, tried),
        "monotone_changes": [asdict(change) for change in program.changes],
        "layers": _layers(choices, table, assignment),
    }


def _decibels(error: float) -> float:
    return round(decibels(1.0, error), 3)


def _used(choices: Sequence[LayerChoices], chosen: Tried, solved: Allocation) -> dict[str, Any]:
    uses = solved.budgets
    parts = {"bytes": chosen.bytes, "bits": round(chosen.mean_bits * allocated_weights(choices))}
    limits = [use.limit for use in uses if use.unit == "bytes"]
    taken = sum(entry.costs[chosen.weights[entry.site.name]] for entry in choices if has_choice(entry))
    return {
        "bytes": chosen.bytes,
        "bytes_limit": min(limits) if limits else None,
        "allocated_bytes": stored_bytes(choices, chosen.weights),
        "share": max(parts[use.unit] / use.limit for use in uses),
        "mean_bits": mean_bits(choices, chosen.weights),
        "mean_bits_stored": 8 * taken / allocated_weights(choices),
    }


def _groups(
    choices: Sequence[LayerChoices], program: Program, weights: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for name, metric in program.groups.items():
        entries = [entry for entry in choices if entry.metric_group == name and has_choice(entry)]
        counted = Counter[int]()
        for entry in entries:
            counted[nominal_bits(weights[entry.site.name])] += len(entry.singles)
        rows.append(
            {
                "name": name,
                "metric": metric,
                "layers": sum(len(entry.singles) for entry in entries),
                "weights": sum(entry.weights for entry in entries),
                "mean_bits": mean_bits(entries, weights),
                "histogram": {str(bits): counted[bits] for bits in sorted(counted)},
            }
        )
    return rows


def _points(
    choices: Sequence[LayerChoices], table: Table, chosen: Tried, tried: Sequence[Tried]
) -> list[dict[str, Any]]:
    rows = []
    for item in sorted(tried, key=lambda item: (item.bytes, item.error)):
        beaten = any(
            other.bytes <= item.bytes
            and other.error <= item.error
            and (other.bytes, other.error) != (item.bytes, item.error)
            for other in tried
        )
        rows.append(
            {
                "label": item.label,
                "bytes": item.bytes,
                "mean_bits": item.mean_bits,
                "predicted_loss": predicted_error(choices, table, item.weights),
                "sqnr_db": _decibels(item.error),
                "on_front": not beaten,
                "for_this_budget": item.asked,
                "eligible": item.eligible,
                "chosen": item is chosen,
            }
        )
    return rows


def _layers(choices: Sequence[LayerChoices], table: Table, assignment: Assignment) -> list[dict[str, Any]]:
    rows = []
    for entry in choices:
        label = assignment.weights[entry.site.name]
        measured = {
            offered: row.value
            for offered in sorted(entry.costs, key=nominal_bits)
            if (row := table.at("weight", entry.site.name, offered)) is not None
        }
        first = table.at("weight", entry.site.name, next(iter(measured))) if measured else None
        own = {single.site.name: single for single in entry.singles}
        for name in entry.names:
            rows.append(
                {
                    "name": name,
                    "group": entry.metric_group,
                    "metric": first.metric if first else None,
                    "weight_bits": nominal_bits(label),
                    "activation_bits": assignment.activations.get(name, FLOAT_BITS),
                    "weights": own[name].weights if name in own else 0,  # of a tied copy none
                    "bytes": own[name].costs[label] if name in own else 0,
                    "decided_by": "allocation" if has_choice(entry) else entry.decided_by,
                    "sensitivity": measured,
                }
            )
    return rows
