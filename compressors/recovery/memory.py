"""What training needs, from shapes: memory while it runs, and disk for the state that it can go on from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ...models.base import ModelSpec
from ...recipes.recovery import TrainingSettings
from ..base import StagePlan
from .state import COPIES_ON_DISK

_FLOAT32 = 4


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
    weights = _FLOAT32 * sum(prod(tensor.shape) for tensor in spec.tensors.values())
    items = settings.batch_size // settings.accumulate
    return TrainingBytes(
        weights=weights,
        gradients=weights,
        moments=2 * weights,
        average=weights if settings.ema is not None else 0,
        activations=items * activation_bytes(spec, settings.precision),
    )


def activation_bytes(spec: ModelSpec, precision: str = "float32") -> int:
    """Return the bytes that autograd keeps of one item at the reference input, weights apart.

    Found on the meta device: nothing is computed. Of reduced precision half is counted, though
    norms and losses stay in float32.
    """
    module = spec.meta_module().float().train()
    generator = torch.Generator()
    generator.manual_seed(0)
    inputs = spec.family.example_inputs(module, 1, generator)
    counted = _SavedBytes(module)
    moved = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(counted.pack, _unpack):
        output = module(**moved)
    del output
    return counted.bytes if precision == "float32" else counted.bytes // 2


class _SavedBytes:
    """Counts what autograd keeps, every storage once and parameters not at all."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._kept: list[Tensor] = []  # so that the address of a storage is not given to another
        self._seen = {tensor.untyped_storage()._cdata for tensor in module.parameters()}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


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
