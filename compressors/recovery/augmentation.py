"""What a step sees of which images: order, mirroring, moving, mixing. All of it follows from the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...calibration.seeds import generator_for
from ...recipes.recovery import FinetuneSettings

SHIFT_SHARE = 8
"""Images are moved by up to one part in so many of their height and width."""


@dataclass(frozen=True)
class Draw:
    """What was drawn for the items of one batch, or of a part of it.

    Attributes:
        items: [n] int64, of the image set.
        mirrored: [n] bool.
        moved: [n, 2] float32 in [-1, 1]: down and to the right, in shares of the largest way.
        partners: the same of the images that are mixed in; None: nothing is.
        share: of the image itself in a mixed one.
    """

    items: Tensor
    mirrored: Tensor
    moved: Tensor
    partners: Draw | None = None
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.items)

    def part(self, index: int, parts: int) -> Draw:
        """Return one of `parts` equal parts."""
        size = len(self) // parts
        rows = slice(index * size, (index + 1) * size)
        partners = None if self.partners is None else self.partners.part(index, parts)
        return Draw(self.items[rows], self.mirrored[rows], self.moved[rows], partners, self.share)


def draw(settings: FinetuneSettings, order: Callable[[int, int], Tensor], seed: int, step: int) -> Draw:
    """Draw the batch of a step.

    Args:
        settings: `batch_size`, `augment`, `mixup`.
        order: of the items; see `schedule.item_order`.
        seed: of the stage.
        step: from 0.
    """
    size = settings.batch_size
    generator = generator_for(seed, "augment", step)
    mirrored = torch.rand(size, generator=generator) < 0.5
    moved = torch.rand(size, 2, generator=generator) * 2 - 1
    chosen = Draw(
        order(step, size),
        mirrored & ("flip" in settings.augment),
        moved * ("shift" in settings.augment),
    )
    if not settings.mixup:
        return chosen
    mixing = generator_for(seed, "mixup", step)
    other = torch.randperm(size, generator=mixing)
    partners = Draw(chosen.items[other], chosen.mirrored[other], chosen.moved[other])
    # One share for the whole batch, from Beta(alpha, alpha), as in arXiv 1710.09412.
    share = float(np.random.default_rng(mixing.initial_seed()).beta(settings.mixup, settings.mixup))
    return Draw(chosen.items, chosen.mirrored, chosen.moved, partners, share)


def transform(pixels: Tensor, mirrored: Tensor, moved: Tensor) -> Tensor:
    """Mirror and move images; what comes in at a border repeats the border.

    Args:
        pixels: [n, channels, height, width].
        mirrored: [n] bool: left and right change places, before it is moved.
        moved: [n, 2] in [-1, 1]; see `Draw`. Whole pixels, rounded to nearest.
    """
    if not mirrored.any() and not moved.any():
        return pixels
    items, channels, height, width = pixels.shape
    largest = torch.tensor([height // SHIFT_SHARE, width // SHIFT_SHARE])
    ways = (moved * largest).round().to(torch.int64)
    rows = (torch.arange(height) - ways[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) - ways[:, 1:]).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    return pixels[
        torch.arange(items)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def mix(pixels: Tensor, partners: Tensor, share: float) -> Tensor:
    """Return share * pixels + (1 - share) * partners."""
    return torch.lerp(partners, pixels, share)
