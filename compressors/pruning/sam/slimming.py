"""The phases of slimming, one after the other, and what each of them leaves on disk."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ....calibration.classification import warn_of_left_out
from ....calibration.content import hash_weights
from ....calibration.scene_sets import SceneSet, split_for_choice
from ....calibration.segmentation import SegmentationCalibration
from ....models.base import OpenModel
from ....progress import Progress, step
from ....recipes.slimsam import SlimSamSettings
from ....runtime.atomic import remove_folder
from ....runtime.hashes import digest
from ....runtime.memory import return_freed_memory
from ..deciding import readable_json
from .aligning import Aligned, align
from .choosing import Kept, choose
from .cutting import cut_bottleneck, cut_embedding
from .details import (
    ATTACHMENT,
    Sizes,
    aligned_row,
    pruned_row,
    slimming_document,
    stage_details,
    verdict_json,
)
from .features import encoder_of
from .judging import Choice
from .learning import Teachers
from .losses import Phase, feature_share
from .records import Records
from .scores import DisturbedTaylor, score
from .sites import encoder_sites


class Slimming:
    """One application of the stage.

    Args:
        model: slimmed in place.
        settings: of the stage.
        calibration: its images; those that are not measured on are scored and trained on.
        folder: of the stage; a killed run is continued from it.
        progress: sees the phases.

    Raises:
        SourceError: there are too few images.
    """

    def __init__(
        self,
        model: OpenModel,
        settings: SlimSamSettings,
        calibration: SegmentationCalibration,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._model, self._settings, self._calibration = model, settings, calibration
        self._folder, self._progress = folder, progress
        images = calibration.training()
        _tell(images, calibration, progress)
        self._train, self._chosen_by = split_for_choice(images, settings.choice_images, calibration.seed)
        self._scored = self._train.first(calibration.samples)
        self._before = Sizes.of(model)
        content = [
            settings.model_dump(mode="json", exclude={"checkpoint_every"}), calibration.key,
            self._train.key, self._chosen_by.key, self._scored.key, hash_weights(model.module),
        ]  # fmt: skip
        self._key = digest(content)
        self._records = Records(folder, self._key, progress)
        self._kept = Kept(None, (), ())
        self._phases: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """Carry out all phases; return the details of the stage.

        Raises:
            PlanError: the ratio leaves too little.
            SourceError: an image can no longer be read.
            StageError: nothing can be ranked, or a training did not stay finite.
        """
        one_step = self._settings.slimming == "one_step"
        began = time.monotonic()
        first = "pruning" if one_step else "embedding pruning"
        with step(self._progress, first):
            kept = self._decided(first, embedding=True, bottleneck=one_step)
            # Copied after the scores, so that one model less is in memory meanwhile.
            original = _frozen(self._model.module)
            choice = Choice(self._chosen_by, original)
            before = self._measured_before(choice, original)
            self._cut(first, kept, choice, began)
        teachers = Teachers(original)
        if one_step:
            self._align("aligning", "outputs", teachers, choice, 2 * self._steps)
        else:
            self._align("embedding aligning", "embedding", teachers, choice, self._steps)
            if self._needs_previous:
                teachers = replace(teachers, previous=_frozen(encoder_of(self._model.module)))
            self._second_half(teachers, choice)
        return self._finished(before, choice)

    def _second_half(self, teachers: Teachers, choice: Choice) -> None:
        began, name = time.monotonic(), "bottleneck pruning"
        with step(self._progress, name):
            self._cut(name, self._decided(name, embedding=False, bottleneck=True), choice, began)
        self._align("bottleneck aligning", "bottleneck", teachers, choice, self._steps)

    @property
    def _steps(self) -> int:
        """Optimizer steps of one aligning."""
        return self._settings.steps_for(len(self._train))

    @property
    def _needs_previous(self) -> bool:
        """Whether the second aligning compares anything with the model that the first one left."""
        settings = self._settings
        share = feature_share("bottleneck", 0, weight=settings.feature_weight, epochs=settings.feature_epochs)
        return settings.features and share > 0

    def _decided(self, phase: str, *, embedding: bool, bottleneck: bool) -> Kept:
        """Score the model as it is now and choose; or read what was chosen before a kill."""
        name, folder = f"{phase}, kept", self._folder / "scores"
        kept = self._records.read_kept(name)
        if kept is not None:
            self._progress.note(f"{phase}: what a run that was broken off has chosen is used")
        else:
            folder.mkdir(exist_ok=True)
            settings = self._settings
            scores = score(
                self._model, DisturbedTaylor(self._scored, settings.sigma, self._calibration.seed),
                embedding=embedding, bottleneck=bottleneck, gradients=settings.gradients,
                recompute=settings.recompute, folder=folder, progress=self._progress,
            )  # fmt: skip
            kept = choose(scores, encoder_sites(self._model.module), settings)
            self._records.write_kept(name, kept)
        if folder.is_dir():
            remove_folder(folder)
        return_freed_memory()
        return kept

    def _measured_before(self, choice: Choice, original: nn.Module) -> dict[str, Any]:
        """Return what the choice images say of the original, and tell by what they choose."""
        found = self._records.read("before")
        if found is None:
            found = verdict_json(choice.judge(original, self._progress))
            self._records.write("before", found)
        number = "1 image that is" if choice.images == 1 else f"{choice.images} images that are"
        images = f"{number} not trained on"
        if choice.by == "miou":
            how = f"mIoU with {choice.masks} masks of {images}, {found['miou']:.3f} of the original"
        else:
            how = f"the error of the embedding on {images}, since not all of them have masks"
        self._progress.note(f"the weights that stay are chosen by {how}")
        return found

    def _cut(self, phase: str, kept: Kept, choice: Choice, began: float) -> None:
        """Carry out a choice of channels, and measure what is left."""
        settings = self._settings
        if kept.embedding is not None:
            cut_embedding(self._model, kept.embedding, rel_pos=settings.rel_pos)
            self._kept = replace(self._kept, embedding=kept.embedding)
        if kept.attention:
            cut_bottleneck(
                self._model, kept.attention, kept.inner,
                attn_scale=settings.attn_scale, rel_pos=settings.rel_pos,
            )  # fmt: skip
            self._kept = replace(self._kept, attention=kept.attention, inner=kept.inner)
        return_freed_memory()
        row = self._records.read(phase)
        if row is None:
            verdict = choice.judge(self._model.module, self._progress)
            row = pruned_row(phase, self._model, verdict, time.monotonic() - began)
            self._records.write(phase, row)
        self._phases.append(row)

    def _align(self, name: str, phase: Phase, teachers: Teachers, choice: Choice, steps: int) -> None:
        """Train what is left, and measure it; an aligning that was finished is taken over."""
        seed, folder = self._calibration.seed, self._folder / name.replace(" ", "-")
        with step(self._progress, name):
            aligned = align(
                self._model.module, teachers, phase, self._train, choice, self._settings, steps=steps,
                seed=seed, key=self._key, folder=folder, progress=self._progress,
            )  # fmt: skip
        return_freed_memory()
        row = self._records.read(name)
        if row is None:
            verdict = choice.judge(self._model.module, self._progress)
            row = aligned_row(name, aligned, verdict, self._settings, len(self._train))
            self._records.write(name, row)
            self._progress.note(_told(name, aligned, choice.by, steps))
        self._phases.append(row)

    def _finished(self, before: dict[str, Any], choice: Choice) -> dict[str, Any]:
        """Write down what was kept, and return the details."""
        after = Sizes.of(self._model)
        images = {
            "score_images": len(self._scored),
            "train_images": len(self._train),
            "choice": {"by": choice.by, "images": choice.images, "masks": choice.masks},
        }
        document = slimming_document(
            self._kept, self._settings, self._before, after, seed=self._calibration.seed, images=images,
            calibration=self._calibration.key,
        )  # fmt: skip
        self._model.attachments[ATTACHMENT] = readable_json(document)
        return stage_details(
            self._settings, self._before, after, images=images, first=before, phases=self._phases
        )


def _frozen(module: nn.Module) -> nn.Module:
    """Return a copy that nothing trains."""
    return copy.deepcopy(module).eval().requires_grad_(False)


def _told(name: str, aligned: Aligned, by: str, steps: int) -> str:
    """Say which weights of an aligning stay, and where the learning rate was halved."""
    what = "mIoU" if by == "miou" else "error of the embedding"
    rates = aligned.rates
    changed = [number for number in range(1, len(rates)) if rates[number] < rates[number - 1]]
    halved = f"; the learning rate was halved after step {', '.join(map(str, changed))}" if changed else ""
    first = aligned.epochs[0][1]
    return (
        f"{name}: the weights after step {aligned.best_step} of {steps} stay, {what} {aligned.best_value:.4g}"
        f" ({first:.4g} before it){halved}"
    )


def _tell(images: SceneSet, calibration: SegmentationCalibration, progress: Progress) -> None:
    """Warn of images that are left out, as far as the calibration, which looks at fewer, has not."""
    if len(images.skipped) > len(calibration.scenes.skipped):
        warn_of_left_out(replace(images, copies=0), calibration.pools.train.path.as_posix(), progress)
