"""EEP (arXiv 2407.00945): which experts of every layer stay, and how they are merged, found by evolution.

Nothing is trained: an individual is scored by what the model would answer if it were shipped like this, with
a softmax over the rows of the router that stay. Three things are otherwise than in the paper: the choices of
simpler rules are among the first individuals, the router keeps one row per expert unless it is told
otherwise, so that stock code opens what comes out, and groups of layers are found by the layers' numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...calibration.answers import splits_of
from ...calibration.base import Calibration
from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...models.expert_choice import checked_experts, mixture_shape
from ...models.experts import fewer_experts_spec, keep_experts_of
from ...models.mapped_experts import mapped_routers_spec
from ...progress import Progress
from ...recipes.experts import EepSettings
from ...runtime.mapped_routing import check_mappable
from ..base import StagePlan, Workspace
from ..recovery.weights import refuse_quantized
from .experts.field import Field
from .experts.needs import search_bytes, search_notes
from .experts.searching import Searching
from .experts.told import told, write_down

_QUANTIZED = "experts are mixed in floating point"


class Eep:
    """The method. Stateless."""

    method: ClassVar[str] = EepSettings.method
    families: ClassVar[frozenset[str]] = EepSettings.families
    version: ClassVar[int] = 1

    def plan(self, spec: ModelSpec, settings: EepSettings) -> StagePlan:
        """Predict.

        Raises:
            PlanError: the settings do not fit the model, or it is quantized.
        """
        refuse_quantized(settings.method, bool(spec.quantization), _QUANTIZED)
        memory, notes = spec.size().bytes, []
        if settings.experts is not None:
            checked_experts(spec.config, settings.experts, settings.active_experts)
            kept = settings.kept(mixture_shape(spec.config).routing.experts)
        else:
            field = Field.of(spec.config, settings)
            kept = field.space.kept
            memory += search_bytes(spec, settings, field)
            notes = search_notes(spec, settings, field)
        after = least = fewer_experts_spec(spec, kept, settings.active_experts)
        if settings.experts is not None and after.size() == spec.size():
            raise PlanError(
                "experts: all of them stay, and a token goes through as many as before",
                hint="leave some out, or lower active_experts",
            )
        if settings.export == "custom":
            after = mapped_routers_spec(spec, kept, settings.active_experts)
        elif settings.router == "free":
            check_mappable(spec.config)
        return StagePlan(
            method=settings.method,
            before=spec.size(),
            after=after.size(),
            spec=after,
            peak_memory_bytes=memory,
            notes=notes,
            worker_memory_bytes=0 if settings.experts is not None else memory,
            most_workers=settings.lag,
            least=None if least is after else least,
        )

    def apply(
        self,
        model: OpenModel,
        settings: EepSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Search, going on from the archive in the workspace, and change the model in place.

        Raises:
            PlanError: the settings do not fit the model, or it is quantized.
            SourceError: the items cannot be read.
            StageError: no individual has a score, or the search finds nothing new.
        """
        refuse_quantized(settings.method, bool(model.quantization), _QUANTIZED)
        if settings.experts is not None:
            kept = checked_experts(model.config, settings.experts, settings.active_experts)
            before = mixture_shape(model.config).routing
            keep_experts_of(model, kept, active=settings.active_experts)
            write_down(model, before, kept, about={"method": settings.method, "given": True})
            return told(model, before, kept)
        field = Field.of(model.config, settings)
        seed = calibration.seed if settings.seed is None else settings.seed
        splits = splits_of(settings, model.source.folder, seed)
        return Searching(model, settings, field, splits, seed, workspace, progress).run()
