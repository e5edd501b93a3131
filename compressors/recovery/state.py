"""What a training needs to go on: one safetensors file, whole or absent, never a pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ...errors import CompressError
from ...runtime.atomic import atomic_file, sweep_partials
from ...runtime.hashes import digest
from ...runtime.tensor_hashes import tensors_sha256
from .ema import MovingAverage

_FILE = "training.safetensors"
_ABOUT = "training"
_MOMENTS = ("exp_avg", "exp_avg_sq")
COPIES_ON_DISK = 2
"""The state before stands until the new one is whole."""


class DamagedStateError(CompressError):
    """A kept state cannot be used; training starts over."""


@dataclass
class TrainingState:
    """Everything that changes from step to step, by reference: reading puts values into these objects.

    Attributes:
        key: content hash of all that decides what training does.
        parameters: name -> float32 parameter.
        optimizer: AdamW.
        average: of the weights; None: none is kept.
        losses: one per finished step.
        scaler: of float16; None: none.
        rows: what a caller of the loop notes on its way: rows of equally many numbers.
    """

    key: str
    parameters: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    average: MovingAverage | None
    losses: list[float]
    scaler: torch.amp.GradScaler | None = None
    rows: list[list[float]] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state on the CPU."""
        found: dict[str, Tensor] = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        if self.rows:
            found["rows"] = torch.tensor(self.rows, dtype=torch.float64)
        for name, parameter in self.parameters.items():
            found[f"weight/{name}"] = parameter
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{moment}/{name}": moments[moment] for moment in _MOMENTS if moment in moments}
            if moments:  # a count per parameter: one without a gradient in a step has no update in it
                found[f"updates/{name}"] = moments["step"]
        if self.average is not None:
            found |= {f"average/{name}": tensor for name, tensor in self.average.tensors.items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def write_state(folder: Path, state: TrainingState) -> None:
    """Keep the state after the last finished step, in the place of the one before.

    The memory of one more copy of the state is needed only where it is not on the CPU already.
    """
    tensors = state.tensors()
    about = {"key": state.key, "scaler": state.scaler.state_dict() if state.scaler else None}
    about["sha256"] = tensors_sha256(tensors)
    with atomic_file(folder / _FILE) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about, sort_keys=True)})


def read_state(
    folder: Path,
    state: TrainingState,
    check: Callable[[Sequence[Sequence[float]]], None] | None = None,
) -> int:
    """Put a kept state in place of the one given, and return how many steps are finished; 0: none is kept.

    Args:
        folder: see `write_state`.
        state: of the training; its key is that of the kept one.
        check: is asked about the kept rows before anything changes, and raises DamagedStateError where
            what belongs to them is not at hand.

    Raises:
        DamagedStateError: what is kept is damaged, or of another training. Nothing is changed.
    """
    sweep_partials(folder)
    path = folder / _FILE
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            about = json.loads(file.metadata()[_ABOUT])
        whole = about["sha256"] == tensors_sha256(tensors)
        same = about["key"] == state.key
    except (OSError, SafetensorError, TypeError, LookupError, ValueError) as error:
        raise DamagedStateError(f"{path}: not a state of a training ({error})") from None
    if not whole:
        raise DamagedStateError(f"{path}: the values are not those that were written")
    if not same:
        raise DamagedStateError(f"{path}: the state of another training")
    if check is not None:
        check(tensors["rows"].tolist() if "rows" in tensors else [])
    _restore(state, tensors)
    if state.scaler is not None and about["scaler"]:
        state.scaler.load_state_dict(about["scaler"])
    return len(state.losses)


def remove_state(folder: Path) -> None:
    """Remove a kept state that nothing goes on from any more."""
    (folder / _FILE).unlink(missing_ok=True)


@torch.no_grad()
def _restore(state: TrainingState, tensors: Mapping[str, Tensor]) -> None:
    """Take over tensors whose checksum and key are right: names and shapes then are as well."""
    state.losses[:] = tensors["losses"].tolist()
    state.rows[:] = tensors["rows"].tolist() if "rows" in tensors else []
    for name, parameter in state.parameters.items():
        parameter.copy_(tensors[f"weight/{name}"])
        if f"updates/{name}" in tensors:
            moments = {
                moment: tensors[f"{moment}/{name}"].to(parameter.device, copy=True) for moment in _MOMENTS
            }
            state.optimizer.state[parameter] = {"step": tensors[f"updates/{name}"].clone(), **moments}
    if state.average is not None:
        state.average.restore({name: tensors[f"average/{name}"] for name in state.parameters})


def state_key(key: str, parameters: Mapping[str, nn.Parameter]) -> str:
    """Return the key of a training: what the caller says that it depends on, and what is trained."""
    return digest([key, [(name, list(parameter.shape)) for name, parameter in parameters.items()]])
