"""Images for a model that segments: prepared as the checkpoint says, perhaps with the masks of their objects.

Here is what the rest of the house knows of them; where they come from, `scene_files` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scene:
    """One image as the model takes it.

    Attributes:
        pixels: [channels, S, S] float32, normalized; zeros right of and below the image.
        size: (height, width) of the image as it is stored, in pixels.
        resized: (height, width) that it has within `pixels`.
    """

    pixels: Tensor
    size: tuple[int, int]
    resized: tuple[int, int]

    def points(self, points: Tensor) -> Tensor:
        """Return points [n, 2] float32 (x, y), given in pixels of the stored image, in those of `pixels`."""
        height, width = self.size
        scale = points.new_tensor([self.resized[1] / width, self.resized[0] / height])
        return points * scale


@dataclass(frozen=True, eq=False)
class Annotation:
    """The mask of one object.

    Attributes:
        mask: [height, width] bool, of the stored image.
        point: (x, y) in pixels of the stored image, on the object: what a user would click on.
    """

    mask: np.ndarray
    point: tuple[float, float]


class Scenes(Protocol):
    """Images in a fixed order; each is read when it is asked for, and none is kept."""

    @property
    def key(self) -> str:
        """Content hash of images, masks, order and preprocessing."""

    @property
    def names(self) -> Sequence[str]:
        """What each image is called, for pictures and messages."""

    @property
    def annotated(self) -> bool:
        """Whether every image has at least one mask."""

    def __len__(self) -> int:
        """How many there are."""

    def scene(self, index: int) -> Scene:
        """Read and prepare one image."""

    def image(self, index: int) -> np.ndarray:
        """Return one image as stored, [height, width, 3] uint8."""

    def annotations(self, index: int) -> Sequence[Annotation]:
        """Return the masks of one image; none where it has none."""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return [b, channels, S, S] float32 of some images."""
