"""Train a classifier after something was removed: labels, the original's answers, or both.

Distillation is soft (arXiv 1503.02531) or hard (DeiT, arXiv 2012.12877); the original that answers is the
model as it was before any stage, not a larger network as in DeiT. Where DeiT's recipe adds CutMix,
RandAugment, erasing and repeated augmentation, this stage has mirroring, small moves and mixup. The last
step is the result (or the moving average of all): nothing is stopped early, and nothing that is only
measured on is ever looked at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.classification import ClassificationCalibration, NoImages, warn_of_left_out
from ...calibration.content import hash_weights
from ...calibration.image_sets import ImageSet
from ...calibration.images import training_images
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.recovery import FinetuneSettings
from ...runtime.hashes import digest
from ..base import StagePlan, Workspace
from .classification import Classification, Images, Teacher
from .details import training_details
from .keeping import BUDGET_BYTES, KeptImages
from .loop import train
from .memory import original_bytes, plan_training
from .schedule import step_count
from .weights import refuse_quantized


class Finetune:
    """Trains all parameters of a classifier; no shape changes."""

    method: ClassVar[str] = FinetuneSettings.method
    families: ClassVar[frozenset[str]] = FinetuneSettings.families
    version: ClassVar[int] = 2

    def plan(self, spec: ModelSpec, settings: FinetuneSettings) -> StagePlan:
        """Predict memory and disk; the shapes stay.

        Raises:
            PlanError: the model is quantized.
        """
        refuse_quantized(settings.method, bool(spec.quantization))
        teacher = original_bytes(spec) if settings.distill is not None else 0
        notes = (f"the original answers beside it: {teacher / 2**20:,.0f} MiB",) if teacher else ()
        return plan_training(spec, settings, teacher_bytes=teacher, data_bytes=BUDGET_BYTES, notes=notes)

    def apply(
        self,
        model: OpenModel,
        settings: FinetuneSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Train in place, going on from the state in the workspace; see `loop.train`.

        Raises:
            PlanError: the model is quantized, labels are missing or do not fit the model, or the original
                is not at hand.
            StageError: training did not stay finite.
        """
        refuse_quantized(settings.method, bool(model.quantization))
        images = _images(model, settings, calibration)
        _check_labels(images, settings, model)
        _tell(images, settings, calibration, progress)
        kept = KeptImages(images)
        steps = step_count(settings, len(images))
        teacher = _teacher(settings, workspace)
        if teacher is not None:
            teacher.prepare(kept, steps, progress)
        seed = calibration.seed
        trained = train(
            Classification(model.module, settings, kept, teacher, seed),
            settings,
            steps=steps,
            seed=seed,
            key=digest([settings.model_dump(mode="json"), steps, images.key, *_weights(model)]),
            folder=workspace.folder,
            progress=progress,
        )
        left_out = {"skipped": len(images.skipped), "held_out": images.copies}
        return {**training_details(trained), "images": len(images), **left_out}


def _weights(model: OpenModel) -> tuple[str, list[tuple[str, str]]]:
    """Return hashes of the weights that are trained, and of the original's."""
    return hash_weights(model.module), sorted(model.source.hashes.items())


def _teacher(settings: FinetuneSettings, workspace: Workspace) -> Teacher | None:
    if settings.distill is None:
        return None
    if workspace.original is None:
        raise PlanError(
            "finetune.distill: the original is not at hand",
            hint="leave out distill, or give the workspace a way to open it",
        )
    return Teacher(workspace.original().module, settings)


def _images(model: OpenModel, settings: FinetuneSettings, calibration: Calibration) -> ImageSet:
    """Return what is trained on: images of the calibration that nothing is measured on, or others.

    Raises:
        PlanError: the calibration is none of images.
        SourceError: images cannot be read.
    """
    if isinstance(calibration, ClassificationCalibration) and settings.images is None:
        return calibration.training()
    if not isinstance(calibration, ClassificationCalibration | NoImages) or settings.images is None:
        raise PlanError("finetune: there are no images to train on", hint="it is for classifiers")
    pools = None if isinstance(calibration, NoImages) else calibration.pools
    return training_images(model, settings.images, pools, calibration.seed)


def _tell(images: ImageSet, settings: FinetuneSettings, calibration: Calibration, progress: Progress) -> None:
    """Tell what is left out and what was assumed, as far as the calibration has not told it."""
    told: tuple[str, ...] = ()
    if isinstance(calibration, ClassificationCalibration):
        chosen, place = calibration.images, calibration.pools.train.path
        if images.source is chosen.source:
            if len(images.skipped) > len(chosen.skipped):  # it looked no further than it had to
                warn_of_left_out(replace(images, copies=0), str(place), progress)
            return
        told = chosen.notes
    for note in images.notes:
        if note not in told:
            progress.note(note)
    warn_of_left_out(images, str(settings.images), progress)


def _check_labels(images: Images, settings: FinetuneSettings, model: OpenModel) -> None:
    """Refuse what the loss cannot be computed from.

    Raises:
        PlanError: no labels where they are needed, or labels that the model has no class for.
    """
    if settings.distill is not None and settings.distill.weight == 1.0:
        return
    if images.labels is None:
        raise PlanError(
            "finetune: the images have no labels, and the loss needs them",
            hint="write distill: {weight: 1.0} to learn from the original's answers alone",
        )
    classes = len(model.config["id2label"])
    unknown = images.labels[(images.labels < 0) | (images.labels >= classes)]
    if len(unknown):
        raise PlanError(
            f"finetune: {len(unknown)} labels such as {int(unknown[0])} are none of the {classes} classes",
            hint="use images of the classes that the model tells apart",
        )
