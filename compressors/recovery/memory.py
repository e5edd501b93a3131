"""What training needs, from shapes: memory while it runs, and disk for the state that it can go on from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from ...models.base import Family, ModelSpec
from ...models.open import read_spec
from ...recipes.depth import TinyFusionSettings
from ...recipes.recovery import TrainingSettings
from ...recipes.schema import ModelRef
from ..activations import activation_bytes
from ..base import StagePlan
from .state import COPIES_ON_DISK

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes of a training.

    Attributes:
        weights: float32, of what is trained.
        gradients: of these.
        moments: the two of AdamW.
        average: of the weights, where one is kept.
        activations: what one part of a batch keeps for the way back.
    """

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def memory(self) -> int:
        """All of it; accelerators hold the same beside the host's weights."""
        return self.weights + self.gradients + self.moments + self.average + self.activations

    @property
    def disk(self) -> int:
        """Of the state, with the one that stands while it is written."""
        return COPIES_ON_DISK * (self.weights + self.moments + self.average)


def training_bytes(spec: ModelSpec, settings: TrainingSettings) -> TrainingBytes:
    """Predict what training all parameters of a model takes.

    Args:
        spec: the model as the stage finds it.
        settings: of the stage.
    """
    weights = FLOAT32_BYTES * sum(prod(tensor.shape) for tensor in spec.tensors.values())
    module = spec.meta_module().float().train()
    return TrainingBytes(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        average=weights if settings.ema is not None else 0,
        activations=part_activation_bytes(module, spec.family, settings),
    )


def part_activation_bytes(
    module: nn.Module, family: Family, settings: TrainingSettings | TinyFusionSettings
) -> int:
    """Return what one part of a batch keeps for the way back.

    Of reduced precision it is half, though norms and losses stay in float32.

    Args:
        module: float32, on the meta device, in training mode.
        family: its adapter.
        settings: of the stage.
    """
    items = settings.batch_size // settings.accumulate
    found = items * activation_bytes(module, family)
    return found if settings.precision == "float32" else found // 2


def original_bytes(spec: ModelSpec) -> int:
    """Return the tensor bytes of the model as it was before any stage."""
    name = str(spec.dtype).removeprefix("torch.")
    original = read_spec(ModelRef.model_validate({"id": str(spec.source.folder), "dtype": name}))
    return original.size().bytes


def plan_training(
    spec: ModelSpec,
    settings: TrainingSettings,
    *,
    teacher_bytes: int = 0,
    data_bytes: int = 0,
    notes: tuple[str, ...] = (),
) -> StagePlan:
    """Return the plan of a stage that trains all parameters and changes no shape.

    Args:
        spec: the model as the stage finds it.
        settings: of the stage.
        teacher_bytes: of a second model that answers meanwhile.
        data_bytes: of what is trained on, where it stays in memory.
        notes: for the user, before ours.
    """
    needed = training_bytes(spec, settings)
    size = spec.size()
    long = f"{settings.steps} steps" if settings.steps is not None else f"{settings.epochs:g} epochs"
    note = (
        f"training: {long} of {settings.batch_size}; {needed.memory / 2**20:,.0f} MiB for weights, gradients,"
        f" moments and activations; a state of {needed.disk // COPIES_ON_DISK / 2**20:,.0f} MiB every"
        f" {settings.checkpoint_every} steps"
    )
    return StagePlan(
        method=settings.method,
        before=size,
        after=size,
        spec=spec,
        peak_memory_bytes=needed.memory + teacher_bytes + data_bytes,
        notes=(*notes, note),
        disk_bytes=needed.disk,
    )
