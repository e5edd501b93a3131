"""SHA-256 of tensors: names, types, shapes and values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, 64 hexadecimal digits.

    Args:
        tensors: name -> tensor, of any dtype and shape, on any device; their order does not count.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        if tensor.numel():  # an empty tensor has no bytes to view
            # Arrays are buffers, which their annotations do not say.
            values: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            found.update(values)
    return found.hexdigest()
