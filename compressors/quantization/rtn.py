"""Round-to-nearest: the grids alone, no balancing. What every other method is held against."""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.stages import RtnSettings
from ..base import StagePlan, Workspace
from .planning import plan_stage
from .stage import apply_stage


class Rtn:
    """Rounds weights to nearest; activations are rounded per token while the model runs."""

    method: ClassVar[str] = RtnSettings.method
    families: ClassVar[frozenset[str]] = RtnSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: RtnSettings) -> StagePlan:
        """Predict tensors, bytes and memory; see `planning.plan_stage`."""
        return plan_stage(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: RtnSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Quantize in place; see `stage.apply_stage`."""
        return apply_stage(model, settings, calibration, progress)
