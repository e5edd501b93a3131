"""Train a denoiser after blocks or channels were removed: masked distillation (TinyFusion, arXiv 2412.01199).

The loss is a weighted sum of three: the distance to the original's predictions for the same noised latents
and the same labels, the loss that denoisers are trained with, and the distance between the outputs of
matching blocks, with values that lie far from their mean masked. Where paper and code differ, this follows
the code. The weight of the last falls with the steps, not with passes over the data: with one pass their
formula divides by zero. With `denoising` alone this is plain fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.content import hash_weights
from ...calibration.diffusion import DiffusionCalibration
from ...calibration.diffusion_loss import task_for
from ...calibration.label_dropout import labels_as_given
from ...calibration.latents import KEPT_BYTES, LatentSet
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...models.blocks import block_lists
from ...progress import Progress
from ...recipes.recovery import MaskedDistillSettings
from ...runtime.hashes import digest
from ..base import StagePlan, Workspace
from .denoising import Distillation, watched
from .details import training_details
from .loop import train
from .matching import Pairs
from .memory import plan_training
from .noised import NoisedBatches
from .schedule import step_count
from .teacher import named_teacher, pairs_with, teacher_bytes, teacher_config
from .tied import tied_embedders
from .weights import refuse_quantized


class Distill:
    """Trains all parameters of a denoiser; no shape changes."""

    method: ClassVar[str] = MaskedDistillSettings.method
    families: ClassVar[frozenset[str]] = MaskedDistillSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: MaskedDistillSettings) -> StagePlan:
        """Predict memory and disk; the shapes stay.

        Raises:
            PlanError: the model is quantized, nothing is known of its blocks and they are compared, or it
                cannot learn from the teacher that is named.
        """
        refuse_quantized(settings.method, bool(spec.quantization))
        if settings.features:
            block_lists(spec.config["_class_name"])
        teacher, name = teacher_bytes(spec, settings), settings.teacher or "the original"
        notes = (f"{name} answers beside it: {teacher / 2**20:,.0f} MiB",) if teacher else ()
        return plan_training(spec, settings, teacher_bytes=teacher, data_bytes=KEPT_BYTES, notes=notes)

    def apply(
        self,
        model: OpenModel,
        settings: MaskedDistillSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Train in place, going on from the state in the workspace; see `loop.train`.

        Raises:
            PlanError: the model is quantized, is no denoiser, or the original is not at hand.
            SourceError: there is nothing to train on, or it cannot be read.
            StageError: training did not stay finite.
        """
        refuse_quantized(settings.method, bool(model.quantization))
        if not isinstance(calibration, DiffusionCalibration):
            raise PlanError(f"{settings.method}: trains denoisers, and {model.family.name} is none")
        original = None if workspace.original is None else cache(workspace.original)
        # Data may take hours to draw: whom to learn from, and block from block, is settled before.
        config = teacher_config(model, settings)
        _check_at_hand(settings, original)
        pairs = pairs_with(model, config, settings) if config is not None and settings.features else {}
        _warn_of_samples(model, settings, calibration, progress)
        data = calibration.training(model, original, progress)
        teacher = _teacher(model, settings, original, progress)
        trained = _train(model, settings, data, teacher, pairs, calibration.seed, workspace, progress)
        told = {name: [list(pair) for pair in rows] for name, rows in pairs.items()}
        return {**trained, "data": len(data), **({"matched": told} if told else {})}


def _warn_of_samples(
    model: OpenModel, settings: MaskedDistillSettings, calibration: DiffusionCalibration, progress: Progress
) -> None:
    """Tell the user where the samples to train on are those of a model that had lost blocks already."""
    data = None if calibration.data is None else calibration.data.settings.data
    if settings.teacher is None or model.source.origins is None or data is None or data.generate is None:
        return
    progress.warn(
        f"{settings.method}: the samples to train on are drawn by {model.source.id}, which has lost blocks,"
        f" and not by {settings.teacher}; name `latents` or `images` as data where it draws badly"
    )


def _train(
    model: OpenModel,
    settings: MaskedDistillSettings,
    data: LatentSet,
    teacher: OpenModel | None,
    pairs: Pairs,
    seed: int,
    workspace: Workspace,
    progress: Progress,
) -> dict[str, Any]:
    steps, task = step_count(settings, len(data)), task_for(model, shape=data.shape)
    class_name = model.config["_class_name"]
    key = digest(
        [settings.model_dump(mode="json"), seed, steps, data.key, pairs, hash_weights(model.module),
         None if teacher is None else sorted(teacher.source.hashes.items())]
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(labels_as_given(model.module))
        stack.enter_context(tied_embedders(model.module, class_name))
        learner = Distillation(
            model.module, settings, NoisedBatches(data, task, settings.batch_size, seed), task, steps
        )
        if teacher is not None:
            learner.teacher = teacher.module.eval().requires_grad_(False)
        if teacher is not None and pairs:
            learner.pairs = pairs
            learner.ours, learner.theirs = stack.enter_context(
                watched(model.module, teacher.module, class_name, pairs)
            )
        trained = train(
            learner, settings, steps=steps, seed=seed, key=key, folder=workspace.folder, progress=progress
        )
    return training_details(trained)


def _check_at_hand(settings: MaskedDistillSettings, original: Callable[[], OpenModel] | None) -> None:
    if settings.asks_original and settings.teacher is None and original is None:
        raise PlanError(
            f"{settings.method}: the original is not at hand",
            hint="write answers: 0 and features: 0, or give the workspace a way to open it",
        )


def _teacher(
    model: OpenModel,
    settings: MaskedDistillSettings,
    original: Callable[[], OpenModel] | None,
    progress: Progress,
) -> OpenModel | None:
    if not settings.asks_original:
        return None
    if settings.teacher is None and original is not None:
        return original()
    return named_teacher(model, settings, progress)
