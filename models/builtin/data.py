"""Fashion-MNIST in its own IDX files, for the scripts that train the built-in models.

The product never reads these files at run time: what it needs it carries in this folder.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

CLASS_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") as stream:
        _, type_code, ndim = struct.unpack(">HBB", stream.read(4))
        if type_code != 8:
            raise ValueError(f"{path}: IDX type {type_code:#x} is not unsigned bytes (0x8)")
        shape = struct.unpack(f">{ndim}I", stream.read(4 * ndim))
        return np.frombuffer(stream.read(), dtype=np.uint8).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read one split.

    Args:
        folder: holds the four ``*-ubyte.gz`` files of Fashion-MNIST.
        split: ``"train"`` (60,000 images) or ``"t10k"`` (10,000).

    Returns:
        images: [n, 1, 28, 28] float32 in [-1, 1].
        labels: [n] int64 in 0..9.
    """
    images = torch.from_numpy(_read_idx(folder / f"{split}-images-idx3-ubyte.gz").copy())
    labels = torch.from_numpy(_read_idx(folder / f"{split}-labels-idx1-ubyte.gz").copy())
    return images[:, None].float().div_(127.5).sub_(1.0), labels.long()
