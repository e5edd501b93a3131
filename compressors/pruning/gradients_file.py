"""Gradients that are summed so far, on disk: what a killed run goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...calibration.content import hash_weights
from ...runtime.atomic import atomic_file, sweep_partials
from ...runtime.hashes import digest
from ...runtime.tensor_hashes import tensors_sha256

_VERSION = 1
"""Raise it when the same key would stand for other sums."""
_ABOUT = "about"
_PATTERN = "gradients-*.safetensors"


@dataclass(frozen=True)
class Partial:
    """How far a sum has come.

    Attributes:
        parts: that are in it.
        samples: that are in it.
        loss_sum: over these samples.
        sums: tensor name -> float32.
    """

    parts: int
    samples: int
    loss_sum: float
    sums: Mapping[str, Tensor]


def key_of(module: nn.Module, objective_key: str, names: Sequence[str]) -> str:
    """Return the hash of all that a sum depends on: weights, samples and loss, the named tensors."""
    return digest([_VERSION, objective_key, list(names), hash_weights(module)])


def write(folder: Path, key: str, partial: Partial) -> None:
    """Keep a sum, whole or not at all; it replaces those of other keys."""
    path = _path(folder, key)
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in partial.sums.items():
        values = value.detach().cpu().contiguous()
        stored[name] = values.clone() if values.data_ptr() in seen else values
        seen.add(values.data_ptr())
    about = {
        "key": key, "parts": partial.parts, "samples": partial.samples, "loss_sum": partial.loss_sum,
        "sha256": tensors_sha256(stored),
    }  # fmt: skip
    with atomic_file(path) as temporary:
        save_file(stored, temporary, metadata={_ABOUT: json.dumps(about)})
    for other in folder.glob(_PATTERN):
        if other != path:
            other.unlink()


def read(folder: Path, key: str, parameters: Mapping[str, Tensor]) -> Partial | None:
    """Return the sum of a key; None where there is none, or where a disk has damaged it.

    Args:
        folder: of the stage.
        key: of what the sum must be.
        parameters: that it must have sums of.
    """
    sweep_partials(folder)
    path = _path(folder, key)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()[_ABOUT])
            if about["key"] != key or set(file.keys()) != set(parameters):
                return None
            sums = {name: file.get_tensor(name) for name in parameters}
        if about["sha256"] != tensors_sha256(sums) or not math.isfinite(about["loss_sum"]):
            return None
        if any(sums[name].shape != parameter.shape for name, parameter in parameters.items()):
            return None
        return Partial(int(about["parts"]), int(about["samples"]), float(about["loss_sum"]), sums)
    except (OSError, SafetensorError, LookupError, TypeError, ValueError):
        return None


def _path(folder: Path, key: str) -> Path:
    return folder / f"gradients-{key[:16]}.safetensors"
