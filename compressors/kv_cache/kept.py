"""What a killed training of factors goes on with: finished attentions, and the state of those under way.

Files are whole or absent, safetensors and JSON alone, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...progress import Progress
from ...runtime.atomic import atomic_file, sweep_partials
from ...runtime.tensor_hashes import tensors_sha256
from .factorise import KvFactors

COPIES_ON_DISK = 2
"""The state before stands until the new one is whole."""
_STATE = "training.safetensors"
_SHA256 = "sha256"
_ABOUT = "training"
_UNREADABLE = (OSError, SafetensorError, TypeError, LookupError, ValueError)


@dataclass(frozen=True)
class LayerState:
    """Where the training of one attention stands.

    Attributes:
        key: content hash of what it started from and of its settings.
        steps: that are finished.
        tokens: that were taken.
        tensors: factors, moments of the optimizer, and tokens that wait, by name; float32.
    """

    key: str
    steps: int
    tokens: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class PartState:
    """Where attentions that are trained side by side stand, after the same tokens.

    Attributes:
        inputs: of each attention that were taken since the replay of the calibration began.
        layers: attention -> its state.
    """

    inputs: int
    layers: Mapping[str, LayerState]


def write_state(folder: Path, state: PartState) -> None:
    """Keep a state in the place of the one before."""
    tensors = {
        f"{name}/{key}": tensor.detach().cpu().contiguous()
        for name, layer in state.layers.items()
        for key, tensor in layer.tensors.items()
    }
    about = {
        "inputs": state.inputs,
        "layers": {
            name: {"key": layer.key, "steps": layer.steps, "tokens": layer.tokens}
            for name, layer in state.layers.items()
        },
        _SHA256: tensors_sha256(tensors),
    }
    with atomic_file(folder / _STATE) as temporary:
        save_file(tensors, temporary, metadata={_ABOUT: json.dumps(about, sort_keys=True)})


def read_state(folder: Path, like: Mapping[str, LayerState], progress: Progress) -> PartState | None:
    """Read the state of attentions, of which more may have been trained side by side.

    Args:
        folder: of the stage.
        like: attention -> the state at its start: the key, and names and shapes of the tensors.
        progress: told of a state that cannot be used.

    Returns:
        None: none is kept, or it is damaged or of another training.
    """
    path = folder / _STATE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            about = json.loads(file.metadata()[_ABOUT])
        if about[_SHA256] != tensors_sha256(tensors):
            raise ValueError("the values are not those that were written")
        layers = {name: _layer(name, start, about["layers"], tensors) for name, start in like.items()}
        return PartState(int(about["inputs"]), layers)
    except _UNREADABLE:
        progress.note(
            f"{path.name}: the kept state is damaged or of another training, and the attentions under way"
            " are trained from their start"
        )
        return None


def _layer(
    name: str, start: LayerState, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LayerState:
    told = about[name]
    if told["key"] != start.key:
        raise ValueError("the state of another training")
    found = {key: tensors[f"{name}/{key}"] for key in start.tensors}
    if any(found[key].shape[1:] != tensor.shape[1:] for key, tensor in start.tensors.items()):
        raise ValueError("tensors of other shapes")
    return LayerState(start.key, int(told["steps"]), int(told["tokens"]), found)


def remove_state(folder: Path) -> None:
    """Remove the state: the attentions that it is of are finished."""
    (folder / _STATE).unlink(missing_ok=True)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def keep_factors(folder: Path, name: str, factors: KvFactors) -> None:
    """Keep the trained factors of an attention."""
    tensors = {key: tensor.contiguous() for key, tensor in factors.tensors().items()}
    with atomic_file(_file(folder, name)) as temporary:
        save_file(tensors, temporary, metadata={_SHA256: json.dumps(tensors_sha256(tensors))})


def kept_factors(folder: Path, start: Mapping[str, KvFactors], progress: Progress) -> dict[str, KvFactors]:
    """Read what an earlier run had finished; what is damaged is trained again."""
    sweep_partials(folder)
    found: dict[str, KvFactors] = {}
    for name, factors in start.items():
        path = _file(folder, name)
        if not path.is_file():
            continue
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in factors.tensors()}
                whole = json.loads(file.metadata()[_SHA256]) == tensors_sha256(tensors)
        except _UNREADABLE:
            whole = False
        same = whole and all(tensors[key].shape == tensor.shape for key, tensor in factors.tensors().items())
        if same:
            found[name] = KvFactors.of(tensors)
        else:
            progress.note(f"{path.name}: the kept factors are damaged, and are trained again")
    return found
