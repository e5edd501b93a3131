"""How many bytes a forward pass keeps for the way back, counted where nothing is computed."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from ..calibration.flags import keeping_flags
from ..models.base import Family


def activation_bytes(module: nn.Module, family: Family) -> int:
    """Return the bytes that autograd keeps of one item at the family's reference input.

    Every storage counts once, the module's own tensors not at all.

    Args:
        module: on the meta device, in the mode and the dtype that it will run in; stays as it is.
        family: its adapter.
    """
    inputs = family.example_inputs(module, 1, torch.Generator().manual_seed(0))
    moved = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    counted = _SavedBytes(module)
    with keeping_flags(module), torch.random.fork_rng(devices=[]), torch.enable_grad():
        module.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, _unpack):
            output = module(**moved)
    del output  # until here its graph held what was counted
    return counted.bytes


class _SavedBytes:
    """Counts storages of tensors that autograd keeps."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._kept: list[Tensor] = []  # so that the address of a storage is not given to another
        own = chain(module.parameters(), module.buffers())
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
