"""Recording a model's calibration, by its kind: trajectories, sequences of a text, or images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models.base import OpenModel
from ..progress import Progress
from . import diffusion
from .base import Calibration
from .classification import ClassificationCalibration, ImageCalls, NoImages, record_images
from .diffusion import DiffusionCalibration
from .image_sets import Pools
from .scene_sets import ScenePools
from .segmentation import SegmentationCalibration, record_scenes
from .sensitivity_calls import Calls, RecordedCalls
from .text import NoText, TextCalibration, TextCalls, record_text

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings


Recorded = (
    DiffusionCalibration
    | TextCalibration
    | NoText
    | ClassificationCalibration
    | SegmentationCalibration
    | NoImages
)


def record(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    cache: Path | None,
    progress: Progress,
    fresh: bool = False,
    pools: Pools | ScenePools | None = None,
    reads: bool = True,
) -> Recorded:
    """Record the original, or find what an earlier run recorded.

    See `diffusion.record`, `record_text`, and `record_images` and `record_scenes`, which keep nothing and
    alone take `pools`, of their kind.
    A language model of which no stage `reads` any text needs none.
    """
    if model.family.task == "language" and not reads:
        return NoText(seed)
    if model.family.task == "language":
        return record_text(model, settings, seed=seed, cache=cache, progress=progress, fresh=fresh)
    if model.family.task == "classify":
        known = pools if isinstance(pools, Pools) else None
        return record_images(model, settings, seed=seed, progress=progress, pools=known)
    if model.family.task == "segment":
        divided = pools if isinstance(pools, ScenePools) else None
        return record_scenes(model, settings, seed=seed, progress=progress, pools=divided)
    return diffusion.record(model, settings, seed=seed, cache=cache, progress=progress, fresh=fresh)


def calls_of(calibration: Calibration, *, steps: int, samples: int | None = None, start: int = 0) -> Calls:
    """Return some of the recorded forwards, for a sensitivity or for comparing allocations.

    Args:
        calibration: of `record`.
        steps: timesteps of each trajectory; sequences and images have none.
        samples: trajectories, sequences or images; None: all from `start` on.
        start: the first of them.

    Raises:
        TypeError: a calibration of another kind, which holds no calls.
    """
    if isinstance(calibration, TextCalibration):
        return TextCalls(calibration, samples, start)
    if isinstance(calibration, ClassificationCalibration):
        return ImageCalls(calibration, samples, start)
    if isinstance(calibration, DiffusionCalibration):
        return RecordedCalls(calibration, steps, samples, start)
    raise TypeError(f"{type(calibration).__name__} holds no recorded calls")
