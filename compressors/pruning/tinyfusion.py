"""TinyFusion (arXiv 2412.01199): which blocks of a denoiser stay is learned, with an eye on their recovery.

Of every group of consecutive blocks a fixed number stays. What is left are blocks of the original, with its
weights; a stage that trains them should follow. Where paper and code differ, this follows the code. Two
things are otherwise than there: a step whose loss is not finite ends the search, and the moving average of a
short search looks back less far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.content import hash_weights
from ...calibration.diffusion import DiffusionCalibration
from ...calibration.diffusion_loss import task_for
from ...calibration.latents import KEPT_BYTES, LatentSet
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...models.blocks import depths
from ...models.shallower import keep_blocks
from ...progress import Progress
from ...recipes.depth import SETTLED, TinyFusionSettings
from ...runtime.hashes import digest
from ..base import StagePlan, Workspace
from ..recovery.details import training_details
from ..recovery.memory import FLOAT32_BYTES, part_activation_bytes
from ..recovery.noised import NoisedBatches
from ..recovery.state import COPIES_ON_DISK
from ..recovery.weights import refuse_quantized
from .block_groups import BlockGroup, groups_of, kept_of
from .block_notes import notes_on_depth, pinned_and_told
from .block_range import range_of_groups, specs_of
from .gates import Annealing, ChoiceGates, Decision
from .lora import low_rank_parameters
from .search import Found, search


class TinyFusion:
    """The method. Stateless."""

    method: ClassVar[str] = TinyFusionSettings.method
    families: ClassVar[frozenset[str]] = TinyFusionSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: TinyFusionSettings) -> StagePlan:
        """Predict. Where blocks differ in size, the largest model that may be left counts.

        Raises:
            PlanError: the groups do not fit the model, or it is quantized.
        """
        refuse_quantized(settings.method, bool(spec.quantization), "a search needs gradients")
        groups = groups_of(spec.config, settings.groups)
        after, least, range_notes = specs_of(spec, range_of_groups(spec.config, groups))
        memory, disk, note = _needs(spec, settings)
        return StagePlan(
            method=settings.method,
            before=spec.size(),
            after=after.size(),
            spec=after,
            peak_memory_bytes=memory + KEPT_BYTES,
            notes=[*notes_on_depth(spec, after, "; which ones is learned"), *range_notes, note],
            disk_bytes=disk,
            least=least,
        )

    def apply(
        self,
        model: OpenModel,
        settings: TinyFusionSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Search, going on from the state in the workspace, and remove the other blocks in place.

        Raises:
            PlanError: the groups do not fit the model, or it is no denoiser, or quantized.
            SourceError: there is nothing to train on, or it cannot be read.
            StageError: the search did not stay finite.
        """
        refuse_quantized(settings.method, bool(model.quantization), "a search needs gradients")
        if not isinstance(calibration, DiffusionCalibration):
            raise PlanError(
                f"{settings.method}: {model.source.id} is no denoiser, and blocks are chosen by its loss"
            )
        groups = groups_of(model.config, settings.groups)
        original = None if workspace.original is None else cache(workspace.original)
        data = calibration.training(model, original, progress)
        found = _searched(model, groups, settings, data, calibration.seed, workspace, progress)
        decision = found.decision
        _tell(groups, decision, progress)
        kept = kept_of(model.config, groups, decision.choices)
        asked = settings.model_dump(mode="json")["groups"]
        about = {
            "method": settings.method,
            "mode": settings.mode,
            "groups": asked,
            "confidences": _rounded(decision.confidences),
            "seed": calibration.seed,
        }
        return {
            "groups": asked,
            "blocks": keep_blocks(model, kept, about),
            "data": len(data),
            **_told(groups, settings, found),
        }


def _searched(
    model: OpenModel,
    groups: Sequence[BlockGroup],
    settings: TinyFusionSettings,
    data: LatentSet,
    seed: int,
    workspace: Workspace,
    progress: Progress,
) -> Found:
    pinned = pinned_and_told(model, progress)
    task = task_for(model, shape=data.shape)
    key = digest(
        [settings.model_dump(mode="json"), data.key, sorted(pinned), hash_weights(model.module), seed]
    )
    annealing = Annealing(settings.tau, settings.scaling, settings.steps)
    return search(
        model.module, model.config["_class_name"],
        ChoiceGates(groups, depths(model.config), annealing, pinned), settings,
        batches=NoisedBatches(data, task, settings.batch_size, seed), task=task, seed=seed, key=key,
        folder=workspace.folder, progress=progress,
    )  # fmt: skip


def _tell(groups: Sequence[BlockGroup], decision: Decision, progress: Progress) -> None:
    """Say which choices have not been settled."""
    several = len({group.blocks for group in groups}) > 1
    open_ones = [
        f"{group.blocks if several else 'blocks'} {group.told} ({sure:.2f})"
        for group, sure in zip(groups, decision.confidences, strict=True)
        if group.choices > 1 and sure < SETTLED
    ]
    if open_ones:
        progress.note(
            f"the choice is not settled for {len(open_ones)} of {len(groups)} groups, by the probability of"
            f" what stays: {'; '.join(open_ones)}; more steps, or a higher gate_lr, settle more"
        )


def _told(groups: Sequence[BlockGroup], settings: TinyFusionSettings, found: Found) -> dict[str, Any]:
    """Return what the report says of the search: the decision from note to note, and how it trained."""
    trained = training_details(found.trained)
    seconds = trained.pop("seconds")
    return {
        "mode": settings.mode,
        "learned": found.learned,
        "choices": [
            {"blocks": group.blocks, "of": list(group.members), "kept": list(group.places(choice)),
             "confidence": sure}
            for group, choice, sure in zip(
                groups, found.decision.choices, _rounded(found.decision.confidences), strict=True
            )
        ],
        "decisions": [
            [step, list(one.choices), _rounded(one.confidences)] for step, one in found.decisions.items()
        ],
        "search": trained,
        "seconds": seconds,
    }  # fmt: skip


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _needs(spec: ModelSpec, settings: TinyFusionSettings) -> tuple[int, int, str]:
    """Return (bytes of memory, bytes on disk, sentence on both)."""
    module = spec.meta_module().float().train()
    weights = FLOAT32_BYTES * sum(item.numel() for item in module.parameters())
    learned = _learned(module, spec.shared, settings)
    stored = spec.size().bytes
    activations = part_activation_bytes(module, spec.family, settings)
    copies = 4 if settings.decay else 3  # two moments and the average, beside what learns
    extra = learned if settings.mode == "lora" else 0
    memory = stored + weights + FLOAT32_BYTES * (learned * copies + extra) + activations
    state = FLOAT32_BYTES * learned * copies
    note = (
        f"search: {settings.steps} steps of {settings.batch_size} through all blocks, in which"
        f" {learned:,} parameters learn beside the choice (mode {settings.mode});"
        f" {memory / 2**20:,.0f} MiB; a state of {state / 2**20:,.0f} MiB every"
        f" {settings.checkpoint_every} steps"
    )
    return memory, COPIES_ON_DISK * state, note


def _learned(module: Any, shared: Mapping[str, str], settings: TinyFusionSettings) -> int:
    """Return how many parameters learn beside the choice; copies of one embedder are one meanwhile."""
    if settings.mode == "frozen":
        return 0
    if settings.mode == "lora":
        return low_rank_parameters(module, settings.lora.rank, frozenset(shared))
    return sum(item.numel() for name, item in module.named_parameters() if name not in shared)
