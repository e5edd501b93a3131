"""Figures between stages: what pruning cost, and what training brought back.

They are measured as the result is, on held-out images or by a denoiser's samples, and kept
beside other measurements, so that a run that goes on with finished stages tells them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from .calibration.content import read_index, write_index
from .evaluation.by_task import Measurer
from .evaluation.classification import ClassificationEvaluator
from .evaluation.evaluator import Evaluator
from .evaluation.reference import Reference
from .evaluation.segmentation import SegmentationEvaluator
from .models.base import OpenModel
from .progress import Progress, step
from .recipes.schema import Stage
from .runtime.atomic import atomic_file
from .workdir import digest

_PHASES = ("prune", "recover")
_DRAWN = "compressed"
_Measures = ClassificationEvaluator | SegmentationEvaluator | Evaluator


@dataclass(frozen=True)
class Interim:
    """Measures after stages that are not the last.

    Attributes:
        evaluator: of the run.
        reference: what it recorded of the original.
        stages: of the recipe.
        folder: where measurements are kept.
        progress: told about it.
    """

    evaluator: Measurer
    reference: Reference
    stages: tuple[Stage, ...]
    folder: Path
    progress: Progress

    def wanted(self, index: int) -> bool:
        """Tell whether the model is measured after a stage: it was pruned or trained, and goes on."""
        changed = self.stages[index].settings.phase in _PHASES
        return isinstance(self.evaluator, _Measures) and changed and index < len(self.stages) - 1

    def kept(self, index: int, stage: Path) -> dict[str, Any]:
        """Return what a stage's details say of it: `measured`, name -> value; empty where it was not.

        Args:
            index: of the stage.
            stage: folder that it is kept in, named by all that its result depends on.
        """
        metrics = read_index(self._file(stage)) if self.wanted(index) else None
        if metrics is None or ("psnr_db" in metrics and not self._drawn(stage).is_file()):
            return {}
        return {"measured": metrics}

    def samples(self, stages: list[Path]) -> dict[str, Tensor]:
        """Return "after METHOD" -> samples [n, C, H, W] of a denoiser, in the order of the stages.

        Args:
            stages: folders of all stages. Of those that were not measured nothing is returned.
        """
        found: dict[str, Tensor] = {}
        methods = [stage.method for stage in self.stages]
        for index, stage in enumerate(stages):
            if self.kept(index, stage) and self._drawn(stage).is_file():
                again = f" {methods[: index + 1].count(methods[index])}"
                name = f"after {methods[index]}{again if methods.count(methods[index]) > 1 else ''}"
                found[name] = load_file(self._drawn(stage))[_DRAWN]
        return found

    def measure(self, index: int, model: OpenModel, stage: Path) -> None:
        """Measure the model as a stage left it, where that is wanted, and keep figures and samples."""
        evaluator = self.evaluator
        if not self.wanted(index) or not isinstance(evaluator, _Measures):
            return
        with step(self.progress, f"figures after {self.stages[index].method}"):
            found = evaluator.between(model, self.reference, self.progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        if _DRAWN in found.images:
            with atomic_file(self._drawn(stage)) as temporary:
                save_file({_DRAWN: found.images[_DRAWN].contiguous()}, temporary)
        write_index(self._file(stage), found.metrics)  # the last: where it is, the rest is

    def _drawn(self, stage: Path) -> Path:
        return self._file(stage).with_suffix(".safetensors")

    def _file(self, stage: Path) -> Path:
        # The reference's name holds the hash of the original, of the images and of what is measured.
        return self.folder / f"between-{digest([stage.name, self.reference.folder.name])[:32]}.json"
