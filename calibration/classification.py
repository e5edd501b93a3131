"""Calibration images of a classifier: chosen by seed, read when they are needed, replayed at will."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import StageError
from ..models.base import OpenModel
from ..progress import Progress, step
from ..runtime.hashes import digest
from .base import Observer
from .content import content_key
from .image_sets import ImageSet, Pools
from .images import pools_of
from .inputs import image_place
from .replay import replay

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class ClassificationCalibration:
    """Images. Implements `calibration.base.Calibration`.

    Attributes:
        seed: of the choice of images, and of the run.
        key: content hash of the model, of all images that it may learn from, and of the choice.
        images: the chosen ones.
        pools: what they are chosen from, and what is held out.
        batch_size: images of one forward.
    """

    seed: int
    key: str
    images: ImageSet
    pools: Pools
    batch_size: int

    @property
    def samples(self) -> int:
        """How many images are calibrated on."""
        return len(self.images)

    @property
    def labels(self) -> Tensor | None:
        """Classes of the images: [samples] int64; None where they are not known."""
        return self.images.labels

    def batches(self) -> list[range]:
        """Return which images every forward takes."""
        return _batches(0, self.samples, self.batch_size)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of every forward, on the CPU: pixel_values [b, c, h, w] float32."""
        for rows in self.batches():
            yield {"pixel_values": self.images.pixels(rows)}

    def count(self) -> int:
        """Return how many forwards there are."""
        return len(self.batches())

    def training(self) -> ImageSet:
        """Return all images that are not held out for measuring.

        Raises:
            SourceError: one cannot be read, where `calibration.strict` is set.
        """
        return self.pools.train.all()

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Run all images through `model.module` as it is now; see `calibration.base.Calibration`.

        There are no timesteps: the observer gets zeros. Hooks are removed however this ends.

        Raises:
            StageError: a name is no module, or was never reached.
        """
        replay(model, names, observer, self.calls(), self.count(), _no_timesteps, progress, kind="image")


@dataclass(frozen=True)
class NoImages:
    """Stands for a calibration where nothing looks at images. Implements `calibration.base.Calibration`."""

    seed: int
    key: str
    samples: int = 0

    def observe(self, model: OpenModel, names: Sequence[str], observer: Observer, progress: Progress) -> None:
        """Refuse.

        Raises:
            StageError: there is nothing to replay.
        """
        raise StageError("there are no images to calibrate on", hint="add `calibration: {images: FOLDER}`")


@dataclass(frozen=True, eq=False)
class ImageCalls:
    """Some of the images, one a call: what a sensitivity is measured on.

    Attributes:
        calibration: the images.
        samples: how many; None: all from `start` on.
        start: the first one.
    """

    calibration: ClassificationCalibration
    samples: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0 or (self.samples is not None and self.samples < 1):
            raise ValueError(f"samples {self.samples} from {self.start} on are none")

    @property
    def seed(self) -> int:
        """Seed of the choice."""
        return self.calibration.seed

    @property
    def key(self) -> str:
        """Content hash of the images and of the choice."""
        content = [self.calibration.key, "images", self.samples, self.start]
        return digest(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the calls in their order."""
        every = self.calibration.samples
        stop = every if self.samples is None else min(self.start + self.samples, every)
        for row in range(self.start, stop):
            yield {"pixel_values": self.calibration.images.pixels([row])}


def record_images(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    progress: Progress,
    pools: Pools | None = None,
) -> ClassificationCalibration | NoImages:
    """Choose the calibration images. Nothing is copied: they are read where they are, each time.

    A recipe that names none, of a model that brings none, gets `NoImages`: pruning by magnitude needs none.

    Args:
        model: a classifier.
        settings: `images`, `samples`, `batch_size`, `strict`.
        seed: of the run.
        progress: told about it, and about images that cannot be read.
        pools: of `pools_of` for these arguments, where they were found already.

    Raises:
        SourceError: see `images.pools_of`; or there are too few.
    """
    if image_place(settings, model.source.folder) is None:
        return NoImages(seed, content_key(model, {"images": None, "seed": seed}))
    with step(progress, "choosing calibration images"):
        pools = pools or pools_of(model, settings, seed)
        chosen = pools.train.first(settings.samples)
    for note in pools.notes:
        progress.note(note)
    warn_of_left_out(chosen, pools.train.path.as_posix(), progress)
    content = {"format": FORMAT_VERSION, "images": chosen.key, "all": pools.train.key, "seed": seed,
               "batch_size": settings.batch_size}  # fmt: skip
    return ClassificationCalibration(seed, content_key(model, content), chosen, pools, settings.batch_size)


class LeftOut(Protocol):
    """A set that knows what is not in it, such as `ImageSet`."""

    @property
    def skipped(self) -> Sequence[str]:
        """Names of files that cannot be read."""

    @property
    def copies(self) -> int:
        """How many are held out for measuring."""


def warn_of_left_out(images: LeftOut, place: str, progress: Progress) -> None:
    """Warn once of files that cannot be read, with the name of the first, and once of held-out images."""
    count = len(images.skipped)
    if count:
        what = "file cannot be read and is" if count == 1 else "files cannot be read and are"
        progress.warn(f"{place}: {count} {what} left out, the first is {images.skipped[0]}")
    if images.copies:
        what = "image is" if images.copies == 1 else "images are"
        progress.warn(f"{place}: {images.copies} {what} held out for measuring and left out here")


def _batches(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def _no_timesteps(call: dict[str, Any]) -> Tensor:
    pixels: Tensor = call["pixel_values"]
    return torch.zeros(len(pixels), device=pixels.device)
