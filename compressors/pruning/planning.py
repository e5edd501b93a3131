"""Predict a pruning stage from the config: exact totals, spread over the layers as if evenly."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import nn

from ...models.base import ModelSpec
from ...recipes.pruning import IsomorphicSettings
from ...recipes.schema import CalibrationSettings
from ..activations import activation_bytes
from ..base import StagePlan
from .cutting import planned_surgery
from .deciding import Moment, cost_of, find_widths
from .graph import find_groups_in
from .groups import Group
from .scores import scored_tensors
from .selection import even_scores, ranked, realise
from .widths import Widths

_BATCH = CalibrationSettings().batch_size
"""Samples of one backward pass, unless the recipe says otherwise."""


def plan_stage(spec: ModelSpec, settings: IsomorphicSettings) -> StagePlan:
    """Predict the stage; no weights are read.

    Raises:
        PlanError: what is asked does not fit the model.
    """
    module = spec.meta_module()
    groups = find_groups_in(module, spec.family)
    scores = even_scores(groups)
    moment = Moment(0, 1, Widths.of(groups), cost_of(spec.cut({})))
    widths, target = find_widths(groups, ranked(groups, scores, settings), spec, settings, moment)
    chosen = realise(groups, scores, widths, settings)  # refuses what would remove nothing
    kept = {name: count for name, count in widths.flat().items() if name in chosen.kept}
    after = spec.cut(planned_surgery(spec, groups, kept, widths.heads))
    return StagePlan(
        method=settings.method,
        before=spec.size(),
        after=after.size(),
        spec=after,
        peak_memory_bytes=_peak_bytes(spec, module, groups, settings),
        notes=_notes(settings, target is not None),
        disk_bytes=_disk_bytes(spec, groups, settings),
    )


def _notes(settings: IsomorphicSettings, aimed: bool) -> list[str]:
    notes = [
        "which layers lose how much depends on the data; here the shares are spread evenly over the layers"
        + ("; the target is kept whatever the spread is" if aimed else "")
    ]
    notes += _notes_on_ranking(settings)
    if settings.steps > 1:
        notes.append(f"scores are computed {settings.steps} times, before each step")
    return notes


def preview_notes(settings: IsomorphicSettings) -> list[str]:
    """Return what a plan says of a stage whose scores are known."""
    notes = _notes_on_ranking(settings)
    if settings.steps > 1:
        notes.append(
            f"all is chosen here by the scores of the first of {settings.steps} steps; the stage computes new"
            " ones before each, and may choose others"
        )
    return notes


def _notes_on_ranking(settings: IsomorphicSettings) -> list[str]:
    if settings.ranking == "isomorphic":
        return []
    return [f"ranking {settings.ranking} is a baseline of the method"]


def _scored_numbers(spec: ModelSpec, groups: Sequence[Group]) -> int:
    return sum(prod(spec.tensors[name].shape) for name in scored_tensors(groups))


def _disk_bytes(spec: ModelSpec, groups: Sequence[Group], settings: IsomorphicSettings) -> int:
    """Gradients summed so far, in float32: the old file stands until the new one is whole."""
    return 8 * _scored_numbers(spec, groups) if settings.importance == "taylor" else 0


def _peak_bytes(
    spec: ModelSpec, module: nn.Module, groups: Sequence[Group], settings: IsomorphicSettings
) -> int:
    """Weights, their gradients in float32, one gradient on its way, what a part's backward pass needs."""
    stored = spec.size().bytes
    numbers = _scored_numbers(spec, groups)
    peak = stored + (2 * stored if settings.baselines else 0)
    if settings.importance == "magnitude":
        return peak + 3 * 4 * max(prod(spec.tensors[name].shape) for name in scored_tensors(groups))
    saved = activation_bytes(module, spec.family) * _BATCH
    widest = max(prod(tensor.shape) for tensor in spec.tensors.values())
    return peak + 4 * numbers + 3 * 4 * widest + saved
