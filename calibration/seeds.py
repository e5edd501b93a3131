"""Random numbers by name: what is drawn for one purpose never depends on what else is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose of a seeded run.

    Args:
        seed: of the run.
        purpose: names and numbers, for example ("noise", 7).
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal_rows(shape: Sequence[int], generators: Iterable[torch.Generator]) -> Tensor:
    """Return standard normal noise, every row from a generator of its own: [rows, *shape] float32 on the CPU.

    Args:
        shape: of a row.
        generators: one per row; what a row gets does not depend on the others.
    """
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
