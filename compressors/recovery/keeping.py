"""Images that stay in memory once they were read, as far as there is room; the others are read each time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Protocol

import torch
from torch import Tensor

from .classification import Images

BUDGET_BYTES = 256 * 2**20
"""Largest size of the pixels of all images, as float32, up to which they stay in memory."""
_MAX_READERS = 8


class Pixels(Protocol):
    """Preprocessed images of one size."""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[b, channels, height, width] float32."""

    def __len__(self) -> int:
        """How many there are."""


class KeptPixels:
    """Images as they are given, kept in memory where all of them fit.

    Where they do not, several threads read and prepare parts of what is asked for: decoding leaves the
    interpreter to the others. What comes out does not depend on any of it.

    Args:
        images: of one size.
        budget_bytes: see `BUDGET_BYTES`.
    """

    def __init__(self, images: Pixels, budget_bytes: int = BUDGET_BYTES) -> None:
        self._images = images
        one = images.pixels([0])
        needed = len(images) * one.nbytes
        self._kept = torch.empty(len(images), *one.shape[1:]) if needed <= budget_bytes else None
        self._known = torch.zeros(len(images), dtype=torch.bool)
        self._readers = max(1, min(_MAX_READERS, cpu_count() or 1))

    def __len__(self) -> int:
        return len(self._images)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return [b, channels, height, width] float32."""
        if self._kept is None:
            return self._read(indices)
        chosen = torch.tensor(indices, dtype=torch.int64)
        missing = chosen[~self._known[chosen]].unique()
        if len(missing):
            self._kept[missing] = self._read(missing.tolist())
            self._known[missing] = True
        return self._kept[chosen]

    def _read(self, indices: Sequence[int]) -> Tensor:
        size = -(-len(indices) // self._readers)
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        if len(parts) == 1:
            return self._images.pixels(indices)
        with ThreadPoolExecutor(len(parts)) as readers:
            return torch.cat(list(readers.map(self._images.pixels, parts)))


class KeptImages(KeptPixels):
    """The same of images that may have labels."""

    def __init__(self, images: Images, budget_bytes: int = BUDGET_BYTES) -> None:
        super().__init__(images, budget_bytes)
        self._labels = images.labels

    @property
    def labels(self) -> Tensor | None:
        """[n] int64, or None."""
        return self._labels
