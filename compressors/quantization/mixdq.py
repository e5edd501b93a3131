"""MixDQ (arXiv 2405.17873): bits per layer, by measured sensitivity and an integer program.

The paper's weights: per output channel, symmetric, min-max, rounded to nearest. Where we differ from its
public code: activations have one dynamic scale per token (the code's static scale per tensor can be
asked for); the default objective adds error powers instead of decibels (`objective: mixdq` is the
paper's); the budget may be bytes of the file, scales included; bits 3, 6 and 16 are offered as well; ranges
at 4 bits and below minimise the squared error (`clip: minmax` is the paper's); and allocations are
compared by the model's own output on several samples, in floating point, where the code compares one
image in 8-bit integers.

The faithful mode is `objective: mixdq, clip: minmax, bits: [2, 4, 8]`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.stages import MixdqSettings
from ..base import StagePlan, Workspace
from .mixed.planning import plan_mixed
from .mixed.stage import apply_mixed


class Mixdq:
    """Measures every layer at every offered number of bits, and allocates them under a budget."""

    method: ClassVar[str] = MixdqSettings.method
    families: ClassVar[frozenset[str]] = MixdqSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: MixdqSettings) -> StagePlan:
        """Predict bytes and memory; see `mixed.planning.plan_mixed`."""
        return plan_mixed(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: MixdqSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Quantize in place; see `mixed.stage.apply_mixed`."""
        return apply_mixed(model, settings, calibration, workspace, progress)
