"""ViDiT-Q (arXiv 2406.02540): static-dynamic channel balance and dynamic per-token activations.

The order of the public v2 code, which is the published paper: channel scale, then randomised Hadamard
rotation, then quantization. Where that code rounds twice (it quantizes the scaled weight, rotates the
result and quantizes again, which costs 10 dB at W4A8) we round once; where it redraws the rotation at
load we store its signs; clamping is to the integer range. `timestep_ranges` is v1: its statistic per
range is kept, but one weight is stored, so the ranges are joined by their maximum.

The faithful mode is `clip: minmax, rounding: nearest, rotation: hadamard, act_exponent: <number>,
weight_symmetric: false, low_rank: 0`, as in the recipe `dit_w4a8_faithful` (exponent 0.5); `mse`,
`gptq`, `low_rank`, `group_size` and the sweep per layer group go beyond the paper.

With `bits` every layer gets bits of its own under a budget (the paper's ViDiT-Q-MP), behind the same
transforms; see `mixed.stage`. The paper's mixed precision sums metrics per group as MixDQ does; here the
objective is MixDQ's with error powers, see `mixed.problem`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.stages import ViditQSettings
from ..base import StagePlan, Workspace
from .mixed.planning import plan_mixed
from .mixed.stage import apply_mixed
from .planning import plan_stage
from .stage import apply_stage


class ViditQ:
    """Balances, rotates and rounds each layer group as its calibration inputs ask for."""

    method: ClassVar[str] = ViditQSettings.method
    families: ClassVar[frozenset[str]] = ViditQSettings.families
    version: ClassVar[int] = 2

    def plan(self, spec: ModelSpec, settings: ViditQSettings) -> StagePlan:
        """Predict tensors, bytes and memory; see `planning.plan_stage` and `mixed.planning`."""
        if settings.allocation is not None:
            return plan_mixed(spec, settings)
        return plan_stage(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: ViditQSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Quantize in place; see `stage.apply_stage` and `mixed.stage.apply_mixed`."""
        if settings.allocation is not None:
            return apply_mixed(model, settings, calibration, workspace, progress)
        return apply_stage(model, settings, calibration, progress)
