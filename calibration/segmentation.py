"""Calibration images of a segmenter: chosen by seed, read when they are needed, replayed at will."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..progress import Progress, step
from .base import Observer
from .classification import NoImages, warn_of_left_out
from .content import content_key
from .inputs import image_place
from .replay import replay
from .scene_files import find_scenes
from .scene_sets import ScenePools, SceneSet, divide

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class SegmentationCalibration:
    """Images. Implements `calibration.base.Calibration`.

    Attributes:
        seed: of the choice of images, and of the run.
        key: content hash of the model, of all images that it may learn from with their masks, and of the
            choice.
        scenes: the chosen ones.
        pools: what they are chosen from, and what is held out.
        batch_size: images of one forward.
    """

    seed: int
    key: str
    scenes: SceneSet
    pools: ScenePools
    batch_size: int

    @property
    def samples(self) -> int:
        """How many images are calibrated on."""
        return len(self.scenes)

    def batches(self) -> list[range]:
        """Return which images every forward takes."""
        count = self.samples
        return [
            range(first, min(first + self.batch_size, count)) for first in range(0, count, self.batch_size)
        ]

    def calls(self) -> Iterator[dict[str, Any]]:
        """Yield the keyword arguments of every forward, on the CPU.

        They are pixel_values [b, 3, S, S] float32 and input_points [b, 1, 1, 2], the middle of each image.
        """
        for rows in self.batches():
            scenes = [self.scenes.scene(row) for row in rows]
            middles = torch.tensor([[scene.resized[1] / 2, scene.resized[0] / 2] for scene in scenes])
            yield {
                "pixel_values": torch.stack([scene.pixels for scene in scenes]),
                "input_points": middles[:, None, None],
            }

    def count(self) -> int:
        """Return how many forwards there are."""
        return len(self.batches())

    def training(self) -> SceneSet:
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


def scene_pools_of(model: OpenModel, settings: CalibrationSettings, seed: int) -> ScenePools:
    """Find and divide the images that a recipe names, or those that come with the model.

    Args:
        model: a segmenter; decides the preprocessing.
        settings: `images`, `strict`.
        seed: of the run; decides orders and, where the place does not, what is held out.

    Raises:
        SourceError: there are none, or they do not fit the model.
    """
    path = image_place(settings, model.source.folder)
    if path is None:
        raise SourceError(
            f"{model.source.id}: a segmenter is calibrated on images, and the recipe names none",
            hint="add `calibration: {images: FOLDER}`",
        )
    return divide(model, find_scenes(path), settings.strict, seed)


def record_scenes(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    progress: Progress,
    pools: ScenePools | None = None,
) -> SegmentationCalibration | NoImages:
    """Choose the calibration images. Nothing is copied: they are read where they are, each time.

    A recipe that names none, of a model that brings none, gets `NoImages`.

    Args:
        model: a segmenter.
        settings: `images`, `samples`, `batch_size`, `strict`.
        seed: of the run.
        progress: told about it, and about images that cannot be read.
        pools: of `scene_pools_of` for these arguments, where they were found already.

    Raises:
        SourceError: see `scene_pools_of`; or there are too few.
    """
    if image_place(settings, model.source.folder) is None:
        return NoImages(seed, content_key(model, {"images": None, "seed": seed}))
    with step(progress, "choosing calibration images"):
        pools = pools or scene_pools_of(model, settings, seed)
        chosen = pools.train.first(settings.samples)
    for note in pools.notes:
        progress.note(note)
    warn_of_left_out(chosen, pools.train.path.as_posix(), progress)
    # The key of some images of a pool is one of all of its images.
    content = {
        "format": FORMAT_VERSION, "images": chosen.key, "seed": seed, "batch_size": settings.batch_size
    }  # fmt: skip
    return SegmentationCalibration(seed, content_key(model, content), chosen, pools, settings.batch_size)


def _no_timesteps(call: dict[str, Any]) -> Tensor:
    pixels: Tensor = call["pixel_values"]
    return torch.zeros(len(pixels), device=pixels.device)
