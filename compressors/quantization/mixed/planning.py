"""Predict a stage that allocates bits: the budget is known beforehand, who gets which bits is not."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from ....calibration.sensitivity_probe import KEPT_LIMIT_BYTES
from ....models.base import ModelSpec
from ....recipes.allocation import SensitivitySettings
from ....runtime.manifest import QuantizedModule
from ...base import StagePlan
from ..details import layer_row
from ..inputs import row_bytes
from ..planning import (
    WORKING_COPIES,
    convolution_notes,
    first_token_notes,
    gram_bytes,
    left_in_floating_point,
    planned_tensors,
    transform_notes,
)
from ..scheme import Choice, options_of, survey_linears
from .candidates import (
    AllocatingSettings,
    Candidates,
    allocation_of,
    bytes_outside,
    find_candidates,
)
from .decision import plan_assignment
from .offers import FLOAT_LABEL, nominal_bits
from .sensing import targets_of

# Of a weight while allocations are compared: as an integer, and in the layout of the fastest product.
_LAID_OUT_BYTES = 2
_WORDS = {"mean_bits": "{} bits per weight on average", "bytes": "{:,} bytes", "ratio": "a ratio of {}"}


def plan_mixed(spec: ModelSpec, settings: AllocatingSettings) -> StagePlan:
    """Predict a stage that allocates bits.

    The predicted tensors are those of an assignment that uses the budget as far as possible by the
    number of weights alone; the sensitivities will decide for another one of no more bytes.

    Raises:
        PlanError: the budget cannot be kept, with what can be asked; or see `survey_linears` and
            `find_candidates`.
    """
    module, spec = spec.family.split(spec.meta_module()), spec.split()
    survey = survey_linears(spec.family, module, settings, spec.quantization)
    candidates = find_candidates(spec.family, survey, settings, spec.dtype, spec.shared)
    fixed_bytes = bytes_outside(spec.tensors, spec.shared, candidates.names)
    assignment = plan_assignment(candidates.layers, allocation_of(settings), fixed_bytes, spec.size().bytes)
    schemes: dict[str, QuantizedModule] = {}
    for layer in candidates.layers:
        for name in layer.names:
            label = assignment.weights[name]
            if label != FLOAT_LABEL:
                schemes[name] = layer.stored(name).schemes[label]
    choices = [
        Choice(site, schemes.get(site.name), candidates.float_rules.get(site.name, "allocated"))
        for site in survey.sites
    ]
    after = spec.evolve(tensors=planned_tensors(spec, choices), quantization=schemes)
    runs = sum(len(target.candidates) for target in targets_of(candidates, survey, settings))
    return StagePlan(
        method=settings.method,
        before=spec.size(),
        after=after.size(),
        spec=after,
        peak_memory_bytes=_peak_bytes(spec, after, candidates, settings),
        notes=_notes(settings, candidates, choices, runs, spec.family.task == "language")
        + first_token_notes(settings, schemes)
        + convolution_notes(module, schemes, settings.group_size)
        + spec.family.beside_linears(module),
        layers=_rows(candidates, choices, spec.dtype),
        disk_bytes=_bank_bytes(candidates),
        worker_memory_bytes=_widened_bytes(spec) + KEPT_LIMIT_BYTES,
    )


def _widened_bytes(spec: ModelSpec) -> int:
    return spec.size().bytes * 4 // min(4, spec.dtype.itemsize)


def _peak_bytes(
    spec: ModelSpec, after: ModelSpec, candidates: Candidates, settings: AllocatingSettings
) -> int:
    """Weights in float32, integer layers beside them, outputs that are kept, work on the largest layer."""
    sites = [single.site for layer in candidates.layers for single in layer.singles]
    widths = {site.name: site.shape[1] for site in sites}
    work = WORKING_COPIES * 4 * max(prod(site.shape) for site in sites) + row_bytes(widths)
    if options_of(settings).compensate:
        work += gram_bytes(sites) + 4 * 4 * max(widths.values()) ** 2
    laid_out = _LAID_OUT_BYTES * sum(layer.weights for layer in candidates.layers)
    return _widened_bytes(spec) + after.size().bytes + max(work, KEPT_LIMIT_BYTES + laid_out)


def _notes(
    settings: AllocatingSettings, candidates: Candidates, choices: list[Choice], runs: int, language: bool
) -> list[str]:
    allocation = allocation_of(settings)
    asked = allocation.budget.model_dump(exclude_none=True)
    limits = " and ".join(_WORDS[name].format(value) for name, value in asked.items())
    chosen = [layer for layer in candidates.layers if len(layer.costs) > 1]
    offered = sorted({nominal_bits(label) for layer in chosen for label in layer.costs})
    count = sum(len(layer.names) for layer in chosen)
    notes = [
        f"a budget of {limits} is dealt out to {count} layers of {', '.join(map(str, offered))} bits:"
        " measured sensitivities decide which layer gets which bits; bytes are those of the budget (it is"
        " never exceeded; a plan assumes that it is used), bits per layer are open",
        _sensing_note(allocation.sensitivity, runs, language),
        "all layers at all bits are kept on the disk until the stage is finished: about"
        f" {_bank_bytes(candidates):,} bytes",
    ]
    shared = [layer for layer in chosen if layer.together]
    if shared:
        count = sum(len(layer.together) for layer in shared)
        notes.append(
            f"{count} layers of experts share {len(shared)} choices: all gates of a mixture are alike, all"
            " ups, and all downs"
        )
    groups = ", ".join(
        f"{group.name} ({len(group.layers)} layers by {group.metric})" for group in candidates.groups
    )
    if len(candidates.groups) > 1 or any(group.metric != "sqnr_db" for group in candidates.groups):
        notes.append(f"groups: {groups}")
    if allocation.objective == "mixdq":
        notes.append(
            "the paper's objective: the largest sum of decibels and similarities, not the least error"
        )
    fixed = [layer for layer in candidates.layers if len(layer.costs) == 1]
    for rule in dict.fromkeys(layer.decided_by for layer in fixed):
        count = sum(layer.decided_by == rule for layer in fixed)
        notes.append(f"{count} layer{'s' if count > 1 else ''} not allocated ({rule})")
    outside = [choice for choice in choices if choice.site.name in candidates.float_rules]
    return notes + left_in_floating_point(outside) + transform_notes(settings)


def _sensing_note(sensitivity: SensitivitySettings, runs: int, language: bool) -> str:
    if sensitivity.table is not None:
        return f"{runs} sensitivities are read from {sensitivity.table}, not measured"
    steps = "" if language else f" and {sensitivity.steps} steps"
    return (
        f"{runs} sensitivities are measured, each on up to {sensitivity.samples} samples{steps}; --workers"
        " measures on several cores, each with weights in float32"
    )


def _bank_bytes(candidates: Candidates) -> int:
    return sum(
        cost for layer in candidates.layers for label, cost in layer.costs.items() if label != FLOAT_LABEL
    )


def _rows(candidates: Candidates, choices: list[Choice], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return one row per linear; bits and bytes of those with a choice are open, their range is told."""
    entries = {name: layer for layer in candidates.layers for name in layer.names}
    return [_row(choice, entries, dtype) for choice in choices]


def _row(choice: Choice, entries: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    row = layer_row(choice, choice.scheme, dtype)
    entry = entries.get(choice.site.name)
    if entry is None or len(entry.costs) == 1:
        return row
    offered = sorted(nominal_bits(label) for label in entry.costs)
    costs = sorted(entry.stored(choice.site.name).costs.values())
    return {
        **row,
        "bits": None,
        "bytes": None,
        "bits_range": [offered[0], offered[-1]],
        "bytes_range": [costs[0], costs[-1]],
        "quantized": None,
        "decided_by": entry.decided_by,
    }
