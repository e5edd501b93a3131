"""The interface of a method: predict from shapes, then do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from ..calibration.base import Calibration
from ..models.base import ModelSpec, OpenModel, Size
from ..progress import Progress
from ..recipes.stages import StageSettings
from ..recipes.workers import RaySettings

S_contra = TypeVar("S_contra", bound=StageSettings, contravariant=True)


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do, predicted from shapes.

    Attributes:
        spec: the model after the stage; the next stage plans on it.
        peak_memory_bytes: resident memory at the stage's worst moment, weights included.
        notes: sentences for the user: what stays in floating point, what is unusual.
        layers: one row per linear: name, bits, bytes, rule that decided.
        disk_bytes: what the stage keeps in its workspace until it is finished.
        worker_memory_bytes: resident memory of each process that works for the stage, where several do.
        most_workers: processes that have something to do; None: any number.
        least: the smallest model that the stage may leave, where data decide how large it is; `spec` is the
            largest then. None: there is one size.
    """

    method: str
    before: Size
    after: Size
    spec: ModelSpec
    peak_memory_bytes: int
    notes: Sequence[str] = ()
    layers: Sequence[dict[str, Any]] = field(default_factory=tuple)
    disk_bytes: int = 0
    worker_memory_bytes: int = 0
    least: ModelSpec | None = None
    most_workers: int | None = None


@dataclass(frozen=True)
class Workspace:
    """Where a stage works, and with how many hands.

    Attributes:
        folder: of this stage alone, named by all that its result depends on; what is put there survives
            a kill, so that the next run goes on with it. It is deleted when the stage is finished.
        shared: kept between runs, for what other settings of a stage can use again (sensitivities, say);
            everything in it is named by the hash of what it depends on.
        workers: processes that a stage may use; of no effect on what comes out.
        reopen: opens the model again as this stage found it, in another process; picklable. None: the
            stage has to do with one process.
        original: opens the model as it was before any stage: what recovery learns from. None: not at hand.
        fresh: measure anew what `shared` holds.
        ray: a cluster that a stage may use in place of processes; of no effect on what comes out.
    """

    folder: Path
    shared: Path
    workers: int = 1
    reopen: Callable[[], OpenModel] | None = None
    original: Callable[[], OpenModel] | None = None
    fresh: bool = False
    ray: RaySettings | None = None


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
        self,
        model: OpenModel,
        settings: S_contra,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> dict[str, Any]:
        """Change `model` in place and return the details for the report (JSON values)."""


@dataclass(frozen=True)
class Preview:
    """What a stage would do, decided on the data.

    Attributes:
        details: that the stage would report, as far as they are known before.
        spec: the model after the stage; the next stage plans on it.
        notes: sentences for the user, in the place of the plan's.
    """

    details: dict[str, Any]
    spec: ModelSpec
    notes: Sequence[str] = ()


@runtime_checkable
class Previewing(Protocol):
    """A method that can say what it would do without doing it."""

    def preview(
        self,
        model: OpenModel,
        settings: Any,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> Preview:
        """Return what `apply` would do; `model` stays as it is."""
