"""The interface of a method: predict from shapes, then do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from ..calibration.base import Calibration
from ..models.base import ModelSpec, OpenModel, Size
from ..progress import Progress
from ..recipes.stages import StageSettings

S_contra = TypeVar("S_contra", bound=StageSettings, contravariant=True)


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do, predicted from shapes.

    Attributes:
        spec: the model after the stage; the next stage plans on it.
        peak_memory_bytes: resident memory at the stage's worst moment, weights included.
        notes: sentences for the user: what stays in floating point, what is unusual.
        layers: one row per linear: name, bits, bytes, rule that decided.
    """

    method: str
    before: Size
    after: Size
    spec: ModelSpec
    peak_memory_bytes: int
    notes: Sequence[str] = ()
    layers: Sequence[dict[str, Any]] = field(default_factory=tuple)


class Compressor(Protocol[S_contra]):
    """A method. Stateless; registered by name in `compressors.registry`."""

    method: ClassVar[str]
    families: ClassVar[frozenset[str]]
    version: ClassVar[int]  # raise it when the same settings give other tensors: caches are keyed by it

    def plan(self, spec: ModelSpec, settings: S_contra) -> StagePlan:
        """Predict; read no weights.

        Raises:
            PlanError: when the stage does not fit the model.
        """

    def apply(
        self, model: OpenModel, settings: S_contra, calibration: Calibration, progress: Progress
    ) -> dict[str, Any]:
        """Change `model` in place and return the details for the report (JSON values)."""
