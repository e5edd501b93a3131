"""Recording a model's calibration, by its kind: trajectories of a denoiser, sequences of a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models.base import OpenModel
from ..progress import Progress
from . import diffusion
from .base import Calibration
from .diffusion import DiffusionCalibration
from .sensitivity_calls import Calls, RecordedCalls
from .text import TextCalibration, TextCalls, record_text

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings


def record(
    model: OpenModel,
    settings: CalibrationSettings,
    *,
    seed: int,
    cache: Path | None,
    progress: Progress,
    fresh: bool = False,
) -> DiffusionCalibration | TextCalibration:
    """Record the original, or find what an earlier run recorded; see `diffusion.record`, `record_text`."""
    if model.family.task == "language":
        return record_text(model, settings, seed=seed, cache=cache, progress=progress, fresh=fresh)
    return diffusion.record(model, settings, seed=seed, cache=cache, progress=progress, fresh=fresh)


def calls_of(calibration: Calibration, *, steps: int, samples: int | None = None, start: int = 0) -> Calls:
    """Return some of the recorded forwards, for a sensitivity or for comparing allocations.

    Args:
        calibration: of `record`.
        steps: timesteps of each trajectory; sequences have none.
        samples: trajectories or sequences; None: all from `start` on.
        start: the first of them.

    Raises:
        TypeError: a calibration of another kind, which holds no calls.
    """
    if isinstance(calibration, TextCalibration):
        return TextCalls(calibration, samples, start)
    if isinstance(calibration, DiffusionCalibration):
        return RecordedCalls(calibration, steps, samples, start)
    raise TypeError(f"{type(calibration).__name__} holds no recorded calls")
