"""Random numbers by name: what is drawn for one purpose never depends on what else is drawn."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose of a seeded run.

    Args:
        seed: of the run.
        purpose: names and numbers, for example ("noise", 7).
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
