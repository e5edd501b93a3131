"""Predict a quantization stage from shapes: tensors, bytes, memory, and what stays in floating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.base import ModelSpec, TensorSpec
from ...recipes.stages import UniformSettings
from ...runtime.linear import tensor_shapes
from ..base import StagePlan
from .details import averages, layer_row
from .inputs import GRAM_BUDGET_BYTES, ROW_BUDGET_BYTES
from .scheme import Choice, choose, options_of

# What rounding one layer holds beside its own float32 weight: the transformed weight, integers,
# and the search's temporaries.
_WORKING_COPIES = 6


def planned_tensors(spec: ModelSpec, choices: Sequence[Choice]) -> dict[str, TensorSpec]:
    """Return the tensors after the stage, each layer's at the place of its weight."""
    schemes = {choice.site.name: choice.scheme for choice in choices if choice.scheme is not None}
    tensors: dict[str, TensorSpec] = {}
    for name, tensor in spec.tensors.items():
        module, _, attribute = name.rpartition(".")
        scheme = schemes.get(module)
        if scheme is None:
            tensors[name] = tensor
        elif attribute == "weight":
            for key, (shape, dtype) in tensor_shapes(scheme, spec.dtype).items():
                tensors[f"{module}.{key}"] = TensorSpec(shape, dtype)
    return tensors


def _peak_bytes(spec: ModelSpec, choices: Sequence[Choice], compensate: bool) -> int:
    """Weights, calibration samples, and the work on the largest layer."""
    quantized = [choice.site.shape for choice in choices if choice.scheme is not None]
    largest = max(rows * columns for rows, columns in quantized)
    widest = max(columns for _, columns in quantized)
    work = _WORKING_COPIES * 4 * largest + ROW_BUDGET_BYTES
    if compensate:
        work += GRAM_BUDGET_BYTES + 4 * 4 * widest * widest
    return spec.size().bytes + work


def _notes(
    choices: Sequence[Choice],
    settings: UniformSettings,
    rows: Sequence[dict[str, Any]],
    shared: Mapping[str, str],
) -> list[str]:
    facts = averages(rows, settings, shared)
    mean = facts["average_bits"]
    notes = [
        f"{facts['label']}: {mean['quantized']} bits per weight on average over the quantized layers,"
        f" {mean['all_linears']} over all linear layers"
    ]
    by_rule: dict[str, list[str]] = {}
    for choice in choices:
        if choice.scheme is None:
            by_rule.setdefault(choice.decided_by, []).append(choice.site.name)
    for rule, names in by_rule.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notes.append(f"left in floating point ({rule}): {shown}")
    options = options_of(settings)
    if options.act_exponent == "sweep":
        notes.append(
            "channel scales are decided on calibration data; those that no producer absorbs are counted for"
            " every layer that may need one"
        )
    if options.rotation == "auto":
        notes.append("rotation is decided on calibration data; its signs are counted for every layer")
    return notes


def plan_stage(spec: ModelSpec, settings: UniformSettings) -> StagePlan:
    """Predict a stage of any of the quantization methods.

    Raises:
        PlanError: see `scheme.choose`.
    """
    choices, _ = choose(spec.family, spec.meta_module(), settings, spec.quantization)
    after = spec.evolve(
        tensors=planned_tensors(spec, choices),
        quantization={choice.site.name: choice.scheme for choice in choices if choice.scheme is not None},
    )
    rows = [layer_row(choice, choice.scheme, spec.dtype) for choice in choices]
    return StagePlan(
        method=settings.method,
        before=spec.size(),
        after=after.size(),
        spec=after,
        peak_memory_bytes=_peak_bytes(spec, choices, options_of(settings).compensate),
        notes=_notes(choices, settings, rows, spec.shared),
        layers=rows,
    )
