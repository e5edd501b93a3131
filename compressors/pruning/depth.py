"""Whole blocks removed by a rule: what learned depth pruning is compared with, or a list of one's own.

The rules are those that TinyFusion (arXiv 2412.01199) compares itself with. Two things are otherwise than in
that code: blocks are judged on latents that were noised over all of the schedule, and on every denoiser.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.objectives import Objective, objective_for
from ...models.base import ModelSpec, OpenModel
from ...models.blocks import depths
from ...models.shallower import keep_blocks
from ...progress import Progress
from ...recipes.depth import DepthSettings
from ...recipes.schema import CalibrationSettings
from ..activations import activation_bytes
from ..base import StagePlan, Workspace
from .block_choice import Kept, draws, indices, lowest, oracle, possible, units_to_remove
from .block_notes import notes_on_depth, pinned_and_told
from .block_range import Range, range_of_count, specs_of
from .block_scores import Scores, change_scores, choice_losses, sensitivities

_BATCH = CalibrationSettings().batch_size
_BLOCKS_AT_ONCE = 4


class Depth:
    """The method. Stateless."""

    method: ClassVar[str] = "depth"
    families: ClassVar[frozenset[str]] = DepthSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: DepthSettings) -> StagePlan:
        """Predict. Where blocks differ in size and data decide which ones stay, the largest model counts."""
        after, least, range_notes = specs_of(spec, _planned(spec, settings))
        looks = settings.by not in ("indices", "oracle")
        stored = spec.size().bytes
        work = _forward_bytes(spec) * _BATCH if looks else 0
        notes = notes_on_depth(spec, after)
        if looks:
            notes += ["which blocks these are depends on the data", *range_notes]
        return StagePlan(
            method=settings.method,
            before=spec.size(),
            after=after.size(),
            spec=after,
            peak_memory_bytes=stored + work,
            notes=notes,
            least=least,
        )

    def apply(
        self,
        model: OpenModel,
        settings: DepthSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Remove blocks in place.

        Raises:
            PlanError: what is asked does not fit the model.
            StageError: no loss is known for the model, or what stays needs what would go.
        """
        kept, found = _chosen(model, settings, calibration, progress)
        about = {"method": settings.method, "by": settings.by, "seed": calibration.seed}
        return {"by": settings.by, "blocks": keep_blocks(model, kept, about), **found}


def _forward_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one item's forward. Without a way back one block's would do; a few are certain."""
    blocks = sum(depths(spec.config).values())
    return activation_bytes(spec.meta_module(), spec.family) * min(_BLOCKS_AT_ONCE, blocks) // blocks


def _planned(spec: ModelSpec, settings: DepthSettings) -> Range:
    """Return the choice where it is known, and else those that leave most and least."""
    if settings.by not in ("indices", "oracle"):
        return range_of_count(spec.config, settings)
    kept = (indices if settings.by == "indices" else oracle)(spec.config, settings)
    return kept, kept


def _chosen(
    model: OpenModel, settings: DepthSettings, calibration: Calibration, progress: Progress
) -> tuple[Kept, dict[str, Any]]:
    """Return what stays, and what decided it."""
    if settings.by == "indices":
        return indices(model.config, settings), {}
    if settings.by == "oracle":
        return oracle(model.config, settings), {}
    units_to_remove(model.config, settings)  # before anything is computed
    instead = "by: oracle and by: indices look at no data"
    objective = objective_for(model, calibration, None, instead)
    pinned = pinned_and_told(model, progress)
    if settings.by == "random":
        return _drawn(model, settings, calibration.seed, objective, pinned, progress)
    scores = _scores(model, settings, objective, progress)
    if settings.by == "shortgpt":  # the code that it comes from never removes the last block
        pinned = {*pinned, *((name, len(row) - 1) for name, row in scores.items())}
    told = {name: [float(f"{value:.6g}") for value in row] for name, row in scores.items()}
    return lowest(model.config, settings, scores, pinned), {"scores": told}


def _scores(model: OpenModel, settings: DepthSettings, objective: Objective, progress: Progress) -> Scores:
    if settings.by == "sensitivity":
        return sensitivities(model, objective, progress)
    return change_scores(model, objective, "shortgpt" if settings.by == "shortgpt" else "flux_lite", progress)


def _drawn(
    model: OpenModel,
    settings: DepthSettings,
    seed: int,
    objective: Objective,
    pinned: set[tuple[str, int]],
    progress: Progress,
) -> tuple[Kept, dict[str, Any]]:
    choices = draws(model.config, settings, seed, pinned)
    there_are = possible(model.config, settings, pinned)
    if there_are <= settings.draws:
        progress.note(f"random: there are {there_are:,} choices, and all of them are measured")
    losses = choice_losses(model, objective, list(choices), progress)
    order = sorted(range(len(choices)), key=lambda index: (losses[index], index))
    place = {"least": 0, "middle": len(order) // 2, "largest": len(order) - 1}[settings.pick]
    chosen = order[place]
    told = {
        "drawn": len(choices),
        "possible": there_are,
        "loss": losses[chosen],
        "least": losses[order[0]],
        "largest": losses[order[-1]],
    }
    return choices[chosen], {"random": told}
