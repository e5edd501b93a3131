"""SmoothQuant (arXiv 2211.10438): one fixed exponent moves activation outliers into the weights.

The paper scales the inputs that a norm can absorb; here every quantized linear is scaled, where no
producer can absorb it with a multiplication at run time, which makes the baseline stronger.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.stages import SmoothQuantSettings
from ..base import StagePlan, Workspace
from .planning import plan_stage
from .stage import apply_stage


class SmoothQuant:
    """Scales channels by s = a^e / w^(1-e) with one exponent for all layers, then rounds."""

    method: ClassVar[str] = SmoothQuantSettings.method
    families: ClassVar[frozenset[str]] = SmoothQuantSettings.families
    version: ClassVar[int] = 2

    def plan(self, spec: ModelSpec, settings: SmoothQuantSettings) -> StagePlan:
        """Predict tensors, bytes and memory; see `planning.plan_stage`."""
        return plan_stage(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: SmoothQuantSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Quantize in place; see `stage.apply_stage`."""
        return apply_stage(model, settings, calibration, progress)
