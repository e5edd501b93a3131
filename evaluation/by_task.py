"""Which evaluation fits a model: samples of a denoiser, next tokens, classes of images, or masks."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..calibration.image_sets import Pools
from ..calibration.questions import Questions
from ..calibration.scene_sets import ScenePools
from ..models.base import OpenModel
from ..progress import Progress
from ..recipes.schema import CalibrationSettings, EvaluateSettings
from .classification import ClassificationEvaluator
from .evaluator import Evaluation, Evaluator
from .language import LanguageEvaluator
from .reference import Reference
from .segmentation import SegmentationEvaluator


class Measurer(Protocol):
    """Records the original once, and compares what the stages made of it."""

    def reference(
        self, model: OpenModel, cache: Path | None, progress: Progress, *, fresh: bool = False
    ) -> Reference:
        """Record the original; `model` is it, before any stage."""

    def compare(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model as it is now against the recording."""


def evaluator_for(
    model: OpenModel,
    settings: EvaluateSettings,
    seed: int,
    calibration: CalibrationSettings,
    pools: Pools | ScenePools | None = None,
    questions: Questions | None = None,
) -> Measurer:
    """Return what measures a model of this kind.

    Args:
        model: the original.
        settings: what to measure.
        seed: of the run.
        calibration: where class labels, prompts, text or images come from.
        pools: images of a classifier or of a model that segments, where they were found already.
        questions: that a language model is asked, where the settings want it.
    """
    if model.family.task == "classify":
        known = pools if isinstance(pools, Pools) else None
        return ClassificationEvaluator(settings, seed, calibration, known)
    if model.family.task == "segment":
        scenes = pools if isinstance(pools, ScenePools) else None
        return SegmentationEvaluator(settings, seed, calibration, scenes)
    if model.family.task == "language":
        return LanguageEvaluator(settings, seed, calibration, questions)
    return Evaluator(settings, seed, calibration)
