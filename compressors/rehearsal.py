"""The most memory that a computation holds at a time, counted by rehearsing it where nothing is computed.

Everything is on the meta device, so a rehearsal needs no memory itself; but every tensor that comes and
goes, on the way back as well, is seen with the size that it will have.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .activations import FusedAttention


def peak_bytes(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the largest set of tensors that live at one moment of a computation.

    Storages count as a whole, each once. Gradients that the computation leaves behind count until they are
    dropped. Attention counts as it is computed on a CPU: in one kernel where its bias takes no gradient.

    Args:
        run: computes on the meta device, and may call `backward`.
        known: tensors that are there anyway and do not count, such as weights.
    """
    counted = _Living(known)
    with torch.random.fork_rng(devices=[]), FusedAttention(), counted:
        run()
    return counted.peak


class _Living(TorchDispatchMode):
    """Counts the bytes of all storages that were made since it began and are still there."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._living: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._see(tensor.untyped_storage())
        # On a CPU this softmax looks for rows without a number, by a flag for every value.
        beside = found.numel() if func is torch.ops.aten._safe_softmax.default else 0
        self.peak = max(self.peak, self._now + beside)
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._known and address not in self._living:
            size = storage.nbytes()
            self._living[address] = weakref.ref(storage, partial(self._forget, address, size))
            self._now += size

    def _forget(self, address: int, size: int, _: object) -> None:
        del self._living[address]
        self._now -= size
