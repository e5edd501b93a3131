"""SlimSAM (arXiv 2312.05284): the image encoder of a Segment Anything model becomes narrower, in turns.

First the residual stream (embedding) is pruned and aligned with the original, then the channels of heads and
of feed-forward networks (bottleneck). Prompt encoder and mask decoder stay as they are. Each part is scored
by disturbed Taylor importance of the model as it is by then, and each aligning compares the inner features
that the part which was not pruned leaves comparable.

It follows the paper's formulas where the released code computes something else; `sam.scores`, `sam.choosing`,
`sam.cutting`, `sam.losses` and `sam.aligning` say where. Everything that is decided is on disk before it is
used, so a run that was killed goes on within the phase at which it stopped, to the same bytes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.base import Calibration
from ...calibration.segmentation import SegmentationCalibration
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...progress import Progress
from ...recipes.slimsam import SlimSamSettings
from ..base import StagePlan, Workspace
from ..recovery.weights import refuse_quantized
from .sam.planning import plan_slimming
from .sam.slimming import Slimming

_GRADIENTS = "slimming needs gradients"


class SlimSam:
    """The method. Stateless."""

    method: ClassVar[str] = SlimSamSettings.method
    families: ClassVar[frozenset[str]] = SlimSamSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: SlimSamSettings) -> StagePlan:
        """Predict; of global ranking the largest and the smallest model that may come out.

        Raises:
            PlanError: the ratio leaves too little, or the model is quantized.
        """
        refuse_quantized(settings.method, bool(spec.quantization), _GRADIENTS)
        return plan_slimming(spec, settings)

    def apply(
        self,
        model: OpenModel,
        settings: SlimSamSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Slim `model` in place, going on with what is in the workspace.

        Raises:
            PlanError: the ratio leaves too little, or the model is quantized.
            SourceError: there are too few images, or one cannot be read.
            StageError: nothing can be ranked, or a training did not stay finite.
        """
        refuse_quantized(settings.method, bool(model.quantization), _GRADIENTS)
        if not isinstance(calibration, SegmentationCalibration):
            raise PlanError(
                f"{settings.method}: {model.source.id} has no images to be scored and aligned on",
                hint="add `calibration: {images: FOLDER}`",
            )
        return Slimming(model, settings, calibration, workspace.folder, progress).run()
