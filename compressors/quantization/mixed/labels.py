"""What a mixed stage is called, and the sensitivities as they stand in its report."""

from __future__ import annotations

from typing import Any

from ....calibration.sensitivity import Table
from ....recipes.allocation import FLOAT_BITS
from .candidates import Candidates
from .offers import FLOAT_LABEL
from .problem import Assignment, mean_bits


def stage_label(candidates: Candidates, assignment: Assignment) -> str:
    """Return a label such as `W4.01A8 mixed`: average nominal bits of what was allocated."""
    weights = mean_bits(candidates.layers, assignment.weights)
    used = {
        assignment.activations[name]
        for layer in candidates.layers
        for name in layer.names
        if layer.activations != (FLOAT_BITS,) and assignment.weights[name] != FLOAT_LABEL
    }
    inputs = "/".join(str(bits) for bits in sorted(used)) or str(FLOAT_BITS)
    return f"W{weights:.4g}A{inputs} mixed"


def compact(table: Table) -> dict[str, Any]:
    """Return a table for the report, a list of values per row."""
    columns = ("kind", "layer", "label", "metric", "value", "loss")
    return {
        "key": table.key,
        "columns": list(columns),
        "rows": [[getattr(row, name) for name in columns] for row in table.rows],
    }
