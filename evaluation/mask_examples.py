"""Masks at a few points, of a picture's size: what the original cuts out, and what the result does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

COUNT = 6
"""Prompts that are shown, each of another image."""
LONGEST_SIDE = 512
"""Pixels of an example's longer side, at most."""
_HALF = 127


@dataclass(frozen=True, eq=False)
class MaskExample:
    """One prompt: the image, the point, and the masks at it, all of one size.

    Attributes:
        name: of the image.
        image: [h, w, 3] uint8.
        point: (x, y) in pixels of `image`.
        original: [h, w] bool, mask of the original.
        result: [h, w] bool, mask of what was made of it.
        truth: [h, w] bool, the true mask; None where it is not known.
        agreement: intersection over union of both models' masks at the size of the stored image, 0-1.
        original_iou: the same of the original's mask and the true one; None without one.
        result_iou: the same of the result's.
    """

    name: str
    image: np.ndarray
    point: tuple[float, float]
    original: np.ndarray
    result: np.ndarray
    truth: np.ndarray | None
    agreement: float
    original_iou: float | None
    result_iou: float | None


def example(
    name: str,
    image: np.ndarray,
    point: Sequence[float],
    masks: tuple[np.ndarray, np.ndarray, np.ndarray | None],
    figures: tuple[float, float | None, float | None],
) -> MaskExample:
    """Return an example whose longer side has at most `LONGEST_SIDE` pixels.

    Args:
        name: of the image.
        image: [height, width, 3] uint8, as stored.
        point: (x, y) in its pixels.
        masks: [height, width] bool: of the original, of the result, and the true one where it is known.
        figures: agreement of both models, and how well each fits the true mask, where that is known.
    """
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    original, result, truth = (None if mask is None else _smaller(mask, size) for mask in masks)
    assert original is not None and result is not None
    return MaskExample(
        name,
        np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)),
        (float(point[0]) * size[0] / width, float(point[1]) * size[1] / height),
        original, result, truth, *figures,
    )  # fmt: skip


def _smaller(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a mask at (width, height): where it covers more than half of a pixel."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize(size, Image.Resampling.BOX)) > _HALF


def pack(masks: Tensor) -> Tensor:
    """Return masks [n, h, w] bool as bits: [n, ceil(h * w / 8)] uint8."""
    return torch.from_numpy(np.packbits(masks.numpy().reshape(len(masks), -1), axis=1))


def unpack(bits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the masks [n, h, w] bool that `pack` was given.

    Args:
        bits: [n, ceil(h * w / 8)] uint8.
        size: (h, w).
    """
    height, width = size
    values = np.unpackbits(bits.numpy(), axis=1, count=height * width)
    return torch.from_numpy(values.reshape(-1, height, width).astype(bool))
