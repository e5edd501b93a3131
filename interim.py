"""Figures of a classifier between stages: what pruning cost, and what training brought back.

They are measured as the result is, on the held-out images, and kept beside other measurements, so that a
run that goes on with finished stages tells them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .calibration.content import read_index, write_index
from .evaluation.by_task import Measurer
from .evaluation.classification import ClassificationEvaluator
from .evaluation.reference import Reference
from .models.base import OpenModel
from .progress import Progress, step
from .recipes.schema import Stage
from .workdir import digest

_PHASES = ("prune", "recover")


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
        return (
            isinstance(self.evaluator, ClassificationEvaluator) and changed and index < len(self.stages) - 1
        )

    def kept(self, index: int, stage: Path) -> dict[str, Any]:
        """Return what a stage's details say of it: `measured`, name -> value; empty where it was not.

        Args:
            index: of the stage.
            stage: folder that it is kept in, named by all that its result depends on.
        """
        metrics = read_index(self._file(stage)) if self.wanted(index) else None
        return {} if metrics is None else {"measured": metrics}

    def measure(self, index: int, model: OpenModel, stage: Path) -> None:
        """Measure the model as a stage left it, where that is wanted, and keep the figures."""
        if not self.wanted(index) or not isinstance(self.evaluator, ClassificationEvaluator):
            return
        with step(self.progress, f"figures after {self.stages[index].method}"):
            metrics = self.evaluator.between(model, self.reference, self.progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_index(self._file(stage), metrics)

    def _file(self, stage: Path) -> Path:
        # The reference's name holds the hash of the original, of the images and of what is measured.
        return self.folder / f"between-{digest([stage.name, self.reference.folder.name])[:32]}.json"
