"""Whose gradient says what a weight is worth: losses over calibration samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import StageError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from .base import Calibration
from .classification import ClassificationCalibration, NoImages
from .denoising import DenoisingObjective
from .diffusion import DiffusionCalibration
from .sampler import place

CLASSIFICATION_LOSSES = ("cross_entropy", "pseudo_labels", "output_norm")
DENOISING_LOSS = "denoising"


class Objective(Protocol):
    """A loss over samples, in parts that fit into memory."""

    @property
    def key(self) -> str:
        """Content hash of the samples and of the loss."""

    @property
    def samples(self) -> int:
        """How many samples the whole loss is over."""

    @property
    def parts(self) -> int:
        """How many parts `losses` yields."""

    def losses(self, model: OpenModel, start: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (loss, samples) part by part, from part `start` on.

        A loss is the SUM over its samples, with its graph, of the model as it is when the part is
        computed. Sums make the result independent of how samples are split into parts.
        """


@dataclass(frozen=True, eq=False)
class ClassificationObjective:
    """A classifier's loss on its calibration images.

    Attributes:
        calibration: the images.
        loss: one of `CLASSIFICATION_LOSSES`.
        labels: [samples] int64 that cross-entropy is taken with; None for `output_norm`.
    """

    calibration: ClassificationCalibration
    loss: str
    labels: Tensor | None

    @property
    def key(self) -> str:
        """Content hash of images, labels and loss."""
        labels = None if self.labels is None else self.labels.tolist()
        return digest([self.calibration.key, self.loss, labels])

    @property
    def samples(self) -> int:
        """How many images there are."""
        return self.calibration.samples

    @property
    def parts(self) -> int:
        """How many batches there are."""
        return self.calibration.count()

    def losses(self, model: OpenModel, start: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (loss, images) batch by batch; see `Objective.losses`."""
        for rows in self.calibration.batches()[start:]:
            logits = _logits(model, self.calibration, rows)
            if self.labels is None:
                yield logits.square().mean(dim=1).sum(), len(rows)
            else:
                wanted = self.labels[rows.start : rows.stop].to(logits.device)
                yield F.cross_entropy(logits, wanted, reduction="sum"), len(rows)


def objective_for(
    model: OpenModel, calibration: Calibration, loss: str | None, instead: str = ""
) -> Objective:
    """Return the loss that a model's weights are judged by.

    Args:
        model: as it is before anything is removed: its answers are the pseudo-labels.
        calibration: of `recording.record`.
        loss: `cross_entropy` with the images' labels; `pseudo_labels`, the same with the model's own
            answers; `output_norm`, the mean square of the logits; `denoising`, the error of a denoiser
            on its own samples. None: cross_entropy of a classifier, denoising of a denoiser.
        instead: what the stage can do without a loss, for the hint where none is known of a denoiser.

    Raises:
        StageError: the loss does not fit the model, or the images have no labels.
    """
    if isinstance(calibration, DiffusionCalibration):
        if loss not in (None, DENOISING_LOSS):
            raise StageError(f"loss {loss}: is for classifiers; {model.family.name} has {DENOISING_LOSS}")
        return DenoisingObjective.of(model, calibration, instead)
    if isinstance(calibration, NoImages):
        raise StageError("there are no images to take a loss of", hint="add `calibration: {images: FOLDER}`")
    if not isinstance(calibration, ClassificationCalibration):
        raise StageError(f"no loss is known for the family {model.family.name}")
    loss = loss or CLASSIFICATION_LOSSES[0]
    if loss not in CLASSIFICATION_LOSSES:
        raise StageError(f"loss {loss}: is not for classifiers; use {', '.join(CLASSIFICATION_LOSSES)}")
    if loss == "output_norm":
        return ClassificationObjective(calibration, loss, None)
    labels = calibration.labels if loss == "cross_entropy" else _answers(model, calibration)
    if labels is None:
        raise StageError(
            f"{calibration.pools.train.path}: the images have no labels, which cross_entropy needs",
            hint="set loss to pseudo_labels or output_norm, or importance to magnitude; or give labels",
        )
    return ClassificationObjective(calibration, loss, labels)


@torch.no_grad()
def _answers(model: OpenModel, calibration: ClassificationCalibration) -> Tensor:
    """Return the model's own classes of the calibration images: [samples] int64."""
    parts = [_logits(model, calibration, rows).argmax(dim=1).cpu() for rows in calibration.batches()]
    return torch.cat(parts)


def _logits(model: OpenModel, calibration: ClassificationCalibration, rows: range) -> Tensor:
    """Return [b, classes] float32; of two heads their mean, as the stock class in evaluation mode."""
    call: dict[str, Any] = {"pixel_values": calibration.images.pixels(rows)}
    logits: Tensor = model.module(**place(call, model.module), return_dict=False)[0]
    return logits.float()
