"""Images that are rows of a tensor: their pixels, and the numbers of their classes. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from safetensors import safe_open

from ..errors import SourceError
from .image_files import LABELS, PIXELS, TensorFile
from .labels import checked


def check_channels(source: TensorFile, channels: int) -> None:
    """Refuse coloured images for a model that takes grey ones; grey ones serve every model.

    Args:
        source: the images.
        channels: 1 or 3, that the model takes.

    Raises:
        SourceError: the images have more.
    """
    if source.channels > channels:
        raise SourceError(
            f"{source.path}: the images have {source.channels} channels, the model takes {channels}",
            hint="convert them before",
        )


def row_labels(source: TensorFile, classes: int) -> np.ndarray:
    """Return the classes of all rows of a file that has labels: [n] int64.

    Args:
        source: the images.
        classes: how many the model tells apart.

    Raises:
        SourceError: a label is none of them.
    """
    with safe_open(source.path, framework="np") as file:
        labels = np.asarray(file.get_tensor(LABELS), dtype=np.int64)
    for extreme in (int(labels.min()), int(labels.max())):
        checked(extreme, classes, source.path)
    return labels


def row_pixels(source: TensorFile, rows: Sequence[int], channels: int) -> list[np.ndarray]:
    """Read some rows, each [channels, height, width] uint8.

    Raises:
        SourceError: see `check_channels`.
    """
    check_channels(source, channels)
    with safe_open(source.path, framework="np") as file:
        pixels = file.get_slice(PIXELS)
        images = [pixels[row : row + 1][0] for row in rows]
    planes = [image.transpose(2, 0, 1) if image.ndim == 3 else image[None] for image in images]
    return [np.repeat(plane, channels // source.channels, axis=0) for plane in planes]
