"""Small folders of generated images: every class has a colour, so that pictures differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, names: list[str], seed: int = 0, side: int = 20) -> Path:
    """Write one PNG per name, made of noise around a colour of its own; returns the folder."""
    for index, name in enumerate(names):
        generator = np.random.default_rng([seed, index])
        colour = generator.integers(60, 200, 3)
        noise = generator.integers(-50, 50, (side, side + 4, 3))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((colour + noise).astype(np.uint8)).save(path)
    return folder


def by_class(folder: Path, classes: list[str], each: int, seed: int = 0) -> Path:
    """Write a folder per class with `each` images."""
    return write_images(
        folder, [f"{name}/{index:03d}.png" for name in classes for index in range(each)], seed
    )
