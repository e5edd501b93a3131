"""Recorded calls of a denoiser on disk: written one by one, read back one by one.

One safetensors file a call. A tensor that equals the first call's tensor of the same name (text
embeddings, say) is stored once, so that a long trajectory costs little more than its latents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_OUTPUT = "output"
_CALL = "call"
_TENSOR = "__tensor__"


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of a nested value to `tensors` and return the JSON skeleton that is left."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {str(key): _flatten(item, f"{name}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be recorded")


def _unflatten(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(skeleton, dict):
        if set(skeleton) == {_TENSOR}:
            return tensors[skeleton[_TENSOR]]
        return {key: _unflatten(item, tensors) for key, item in skeleton.items()}
    if isinstance(skeleton, list):
        return [_unflatten(item, tensors) for item in skeleton]
    return skeleton


def take(value: Any, batch: int, items: Tensor) -> Any:
    """Return a nested value with the batch items `items` of every tensor whose first length is `batch`."""
    if isinstance(value, Tensor):
        return value[items.to(value.device)] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, Mapping):
        return {key: take(item, batch, items) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [take(item, batch, items) for item in value]
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Return a nested value with its tensors on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_device(item, device) for item in value]
    return value


class CallWriter:
    """Appends calls to an empty folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._first: dict[str, Tensor] = {}
        self.count = 0

    def add(self, kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Store one call.

        Args:
            kwargs: keyword arguments of the denoiser: tensors, scalars, None, nested.
            output: its output, any shape.
        """
        tensors: dict[str, Tensor] = {}
        skeleton = _flatten(dict(kwargs), "kwargs", tensors)
        tensors[_OUTPUT] = output.detach().to("cpu", copy=True).contiguous()
        constant = []
        if self.count == 0:
            self._first = dict(tensors)
        else:
            constant = [name for name, tensor in tensors.items() if self._is_first(name, tensor)]
        stored = {name: tensor for name, tensor in tensors.items() if name not in constant}
        # One key: safetensors orders several at random, and equal calls are to be equal files.
        metadata = {_CALL: json.dumps({"kwargs": skeleton, "constant": constant})}
        save_file(stored, self._folder / f"{self.count:05d}.safetensors", metadata)
        self.count += 1

    def _is_first(self, name: str, tensor: Tensor) -> bool:
        first = self._first.get(name)
        return first is not None and first.dtype == tensor.dtype and torch.equal(first, tensor)


class CallReader:
    """Reads what a `CallWriter` stored; holds one call and the constants in memory."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Tensor]:
        """Return (kwargs, output) of one call, on the CPU."""
        with safe_open(self._files[index], "pt") as stream:
            call = json.loads(stream.metadata()[_CALL])
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if call["constant"]:
            with safe_open(self._files[0], "pt") as stream:
                tensors |= {name: stream.get_tensor(name) for name in call["constant"]}
        output = tensors.pop(_OUTPUT)
        return _unflatten(call["kwargs"], tensors), output

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for index in range(len(self._files)):
            yield self[index]
