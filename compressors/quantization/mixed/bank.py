"""Every layer at every offered bits, rounded once and kept on disk: what is measured is what is shipped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ....runtime.atomic import atomic_file, sweep_partials
from ....runtime.hashes import digest
from ....runtime.linear import QuantizedLinear
from ....runtime.manifest import QuantizedModule
from ....runtime.tensor_hashes import tensors_sha256
from ..building import layer_of

_SEPARATOR = "/"
_DESCRIPTION, _CHECKSUM = "layers", "sha256"  # one key: the writer gives several any order


@dataclass(frozen=True)
class Candidate:
    """A layer at some bits, as it was rounded.

    Attributes:
        scheme: its activation at the fewest bits offered.
        tensors: of the layer, without bias, on the CPU.
        facts: for the report: JSON values.
    """

    scheme: QuantizedModule
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Bank:
    """One file per layer; it is whole or absent, and counts as absent where a disk has damaged it. Picklable.

    Attributes:
        folder: where they are; named by all that they depend on.
        dtype: that the model is stored in: of biases.
    """

    folder: Path
    dtype: torch.dtype

    def prepare(self) -> None:
        """Make the folder, and clear what a killed run left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(self.folder)

    def has(self, name: str) -> bool:
        """Tell whether a layer's candidates are there, every byte as it was written."""
        if not self._path(name).is_file():
            return False
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                described = json.loads(file.metadata()[_DESCRIPTION])
                return bool(described.pop(_CHECKSUM) == _checksum(tensors, described))
        except (OSError, SafetensorError, TypeError, LookupError, ValueError):
            return False

    def write(self, name: str, candidates: Mapping[str, Candidate]) -> None:
        """Keep a layer's candidates, by label."""
        tensors = {
            f"{label}{_SEPARATOR}{key}": tensor.detach().cpu().contiguous()
            for label, candidate in candidates.items()
            for key, tensor in candidate.tensors.items()
        }
        described = {
            label: {"scheme": candidate.scheme.model_dump(mode="json"), "facts": dict(candidate.facts)}
            for label, candidate in candidates.items()
        }
        # The writer refuses tensors that share memory; transforms are the same tensors for every label.
        pointers: set[int] = set()
        for key, tensor in tensors.items():
            if tensor.data_ptr() in pointers:
                tensors[key] = tensor.clone()
            pointers.add(tensor.data_ptr())
        about = {**described, _CHECKSUM: _checksum(tensors, described)}
        with atomic_file(self._path(name)) as temporary:
            save_file(tensors, temporary, metadata={_DESCRIPTION: json.dumps(about)})

    def read(self, name: str, label: str) -> Candidate:
        """Return one candidate of a layer.

        Raises:
            KeyError: the layer was not rounded to these bits.
        """
        with safe_open(self._path(name), framework="pt") as file:
            described = json.loads(file.metadata()[_DESCRIPTION])[label]
            prefix = label + _SEPARATOR
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (no mapping)
            tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in names}
        scheme = QuantizedModule.model_validate_json(json.dumps(described["scheme"]))
        return Candidate(scheme, tensors, described["facts"])

    def labels(self, name: str) -> tuple[str, ...]:
        """Return the bits that a layer was rounded to."""
        with safe_open(self._path(name), framework="pt") as file:
            described = json.loads(file.metadata()[_DESCRIPTION])
        return tuple(label for label in described if label != _CHECKSUM)

    def layer(
        self, name: str, label: str, original: nn.Module, changes: Mapping[str, Any] | None = None
    ) -> QuantizedLinear:
        """Return a candidate as a layer, on the device of the one that it stands for.

        Args:
            name: of the layer.
            label: of the candidate.
            original: the layer in floating point; its bias is taken over, in the model's dtype.
            changes: of the scheme: `activation`, `decided_by`.
        """
        return self.made(self.read(name, label), original, changes)

    def made(
        self, found: Candidate, original: nn.Module, changes: Mapping[str, Any] | None = None
    ) -> QuantizedLinear:
        """Return what `read` found as a layer; the other arguments are those of `layer`."""
        scheme = found.scheme.model_copy(update=dict(changes or {}))
        weight, bias = original.weight, original.bias
        assert isinstance(weight, Tensor)
        tensors = {key: tensor.to(weight.device) for key, tensor in found.tensors.items()}
        kept = bias.detach().to(self.dtype) if isinstance(bias, Tensor) else None
        return layer_of(scheme, self.dtype, tensors, kept)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _checksum(tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a layer's file says."""
    return digest([described, tensors_sha256(tensors)])
