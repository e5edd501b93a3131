"""A model computing in another precision for a while, without a second copy of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Widen the floating-point tensors of a module; they come back bit for bit.

    Tensors that share their memory go on sharing it. A model of 16-bit numbers takes twice its memory
    meanwhile.

    Args:
        module: changed in place; its parameters stay the same objects.
        dtype: what it computes in; None: as it is.

    Raises:
        ValueError: `dtype` cannot hold every value of a tensor.
    """
    before: list[tuple[Tensor, torch.dtype]] = []
    try:
        if dtype is not None:
            _widen(module, dtype, before)
        yield
    finally:
        _convert(before)


def widen(module: nn.Module, dtype: torch.dtype) -> None:
    """Widen the floating-point tensors of a module for good; see `computing_in`."""
    _widen(module, dtype, [])


def _widen(module: nn.Module, dtype: torch.dtype, before: list[tuple[Tensor, torch.dtype]]) -> None:
    tensors = [
        tensor
        for tensor in chain(module.parameters(), module.buffers())
        if tensor.is_floating_point() and tensor.dtype != dtype
    ]
    for tensor in tensors:
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            raise ValueError(f"{dtype} cannot hold {tensor.dtype}")
    before += [(tensor, tensor.dtype) for tensor in tensors]
    _convert([(tensor, dtype) for tensor in tensors])


def _convert(tensors: list[tuple[Tensor, torch.dtype]]) -> None:
    """Convert tensors in place, one after the other; those with the same memory share the new one."""
    pointers = Counter(tensor.data_ptr() for tensor, _ in tensors)
    # Old tensor (kept, so that its address is not given away meanwhile) and new one, by address and shape.
    found: dict[tuple[int, torch.Size], tuple[Tensor, Tensor]] = {}
    for tensor, dtype in tensors:
        pointer = tensor.data_ptr()
        if pointers[pointer] == 1:
            tensor.data = tensor.data.to(dtype)
            continue
        _, new = found.setdefault((pointer, tensor.shape), (tensor.data, tensor.data.to(dtype)))
        tensor.data = new
