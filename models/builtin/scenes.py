"""Shapes over photographs: images whose masks are known, for the built-in Segment Anything model.

A scene is a crop of a photograph with up to four shapes laid over each other; a shape is filled with a crop
of another photograph or with colours, and its edge is soft. What is seen of a shape is its mask.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SOURCES = {
    "chelsea.png": (0, 0, 451, 300),
    "coffee.png": (0, 0, 600, 400),
    "rocket.jpg": (0, 0, 640, 427),
    "astronaut.png": (0, 250, 512, 512),
}
"""Photographs of scikit-image and what is used of them: (left, top, right, bottom), no faces of people."""
SIZES = ((128, 128), (128, 128), (128, 128), (96, 128), (128, 96))
"""(height, width) in pixels; three of five scenes are square."""
KINDS = ("ellipse", "rectangle", "polygon", "star", "ring")
SMALLEST = 200
"""Shapes of which fewer pixels are seen have no mask."""
COVERED = 0.25
"""A shape that would cover more of what is seen of another one is left out."""
DETAIL = 4
"""Outlines are drawn so many times larger and averaged, so that edges are soft."""

Pixels = NDArray[np.uint8]


class Photographs:
    """Photographs in two parts without a common pixel: the left 70 % of each to train on, and the rest.

    Args:
        folder: of the files of `SOURCES`.
        part: "train" or "validation".
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.images: list[Image.Image] = []
        for name, box in SOURCES.items():
            image = Image.open(folder / name).convert("RGB").crop(box)
            cut = round(0.7 * image.width)
            left, right = (0, cut) if part == "train" else (cut, image.width)
            self.images.append(image.crop((left, 0, right, image.height)))

    def crop(
        self, generator: np.random.Generator, height: int, width: int, but: int = -1
    ) -> tuple[Pixels, int]:
        """Return a piece [height, width, 3] of a photograph in changed colours, and which photograph it is.

        Args:
            generator: of every choice.
            height: pixels.
            width: pixels.
            but: the photograph that it shall not be of.
        """
        which = int(generator.choice([index for index in range(len(self.images)) if index != but]))
        image = self.images[which]
        largest = min(image.width / width, image.height / height)
        scale = generator.uniform(min(0.5, largest), min(1.6, largest))
        wide, high = scale * width, scale * height
        left, top = generator.uniform(0, image.width - wide), generator.uniform(0, image.height - high)
        piece = image.resize((width, height), Image.Resampling.BILINEAR, (left, top, left + wide, top + high))
        pixels = np.asarray(piece)[:, :: int(generator.choice([1, -1]))][:: int(generator.choice([1, -1]))]
        return recoloured(pixels, generator), which


def recoloured(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Return pixels [h, w, 3] with channels exchanged, less contrast, and another brightness."""
    changed = pixels[:, :, generator.permutation(3)].astype(np.float32)
    gain, shift = generator.uniform(0.3, 0.9, 3), generator.uniform(-60, 60, 3)
    return np.clip((changed - 128) * gain + 128 + shift, 0, 255).astype(np.uint8)


def outline(kind: str, generator: np.random.Generator) -> NDArray[np.float64]:
    """Return corners [n, 2] of a shape within the unit circle."""
    if kind == "ellipse" or kind == "ring":
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        radii = np.ones(40)
    elif kind == "rectangle":
        half = generator.uniform(0.5, 1.05)
        angles, radii = np.array([half, np.pi - half, np.pi + half, -half]), np.ones(4)
    elif kind == "star":
        points = int(generator.integers(4, 8))
        angles = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False)
        radii = np.where(np.arange(2 * points) % 2, generator.uniform(0.4, 0.6), 1.0)
    else:
        corners = int(generator.integers(3, 8))
        angles = np.sort(
            np.linspace(0, 2 * np.pi, corners, endpoint=False) + generator.uniform(-0.3, 0.3, corners)
        )
        radii = generator.uniform(0.7, 1.0, corners)
    points_at = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    squash = generator.uniform(0.55, 1.0) if kind in {"ellipse", "ring"} else 1.0
    turn = generator.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (points_at * [1.0, squash]) @ rotation.T


def cover(generator: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Return how much of every pixel a random shape covers: [height, width] in 0..1."""
    kind = str(generator.choice(KINDS))
    radius = 0.5 * max(height, width) * np.exp(generator.uniform(np.log(0.28), np.log(0.7)))
    centre = generator.uniform([0.1 * width, 0.1 * height], [0.9 * width, 0.9 * height])
    corners = outline(kind, generator)
    canvas = Image.new("L", (width * DETAIL, height * DETAIL))
    draw = ImageDraw.Draw(canvas)
    draw.polygon([tuple(point) for point in (corners * radius + centre) * DETAIL], fill=255)
    if kind == "ring":
        inner = corners * radius * generator.uniform(0.35, 0.55)
        draw.polygon([tuple(point) for point in (inner + centre) * DETAIL], fill=0)
    return np.asarray(canvas.reduce(DETAIL), dtype=np.float32) / np.float32(255)


def filling(
    photographs: Photographs, generator: np.random.Generator, beneath: NDArray[np.float32], but: int
) -> NDArray[np.float32]:
    """Return pixels [h, w, 3] for a shape that differ from what lies beneath in their mean colour.

    Args:
        photographs: to cut from.
        generator: of every choice.
        beneath: mean colour [3] of the pixels that it covers.
        but: the photograph of the background, which is not used again.
    """
    height, width = 128, 128
    if generator.uniform() < 0.6:
        pixels = photographs.crop(generator, height, width, but)[0].astype(np.float32)
    else:
        ends = generator.uniform(0, 255, (2, 3)).astype(np.float32)
        slope = np.linspace(0, generator.uniform(0, 0.4), width, dtype=np.float32)[None, :, None]
        grain = generator.normal(0, generator.uniform(0, 12), (height, width, 1)).astype(np.float32)
        pixels = ends[0] + slope * (ends[1] - ends[0]) + grain
    gap = pixels.mean(axis=(0, 1)) - beneath
    strongest = int(np.abs(gap).argmax())
    if abs(gap[strongest]) < 70:
        # Towards the side with more room, so that clipping does not undo it.
        pixels[:, :, strongest] += np.float32((110 if beneath[strongest] < 128 else -110) - gap[strongest])
    return pixels


def hides(inside: NDArray[np.bool_], labels: Pixels) -> bool:
    """Tell whether a shape [h, w] covers too much of another one that `labels` [h, w] shows."""
    seen = np.bincount(labels.ravel())[1:]
    left = np.bincount(labels[~inside], minlength=len(seen) + 1)[1:]
    return bool((left < (1 - COVERED) * seen).any())


def draw_scene(photographs: Photographs, generator: np.random.Generator) -> tuple[bytes, Pixels]:
    """Return an image [h, w, 3] as a JPEG file, and what its pixels show: 0 background, 1.. a shape.

    Args:
        photographs: to cut from.
        generator: of every choice.
    """
    height, width = SIZES[int(generator.integers(len(SIZES)))]
    background, which = photographs.crop(generator, height, width)
    image, labels = background.astype(np.float32), np.zeros((height, width), dtype=np.uint8)
    for label in range(1, int(generator.integers(1, 5)) + 1):
        share = cover(generator, height, width)
        inside = share >= 0.5
        if inside.sum() < SMALLEST or hides(inside, labels):
            continue
        fill = filling(photographs, generator, image[inside].mean(axis=0), which)[:height, :width]
        image += share[:, :, None] * (fill.clip(0, 255) - image)
        labels[inside] = label
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue(), labels


def decoded(file: bytes) -> Pixels:
    """Return the pixels [h, w, 3] of a JPEG file."""
    return np.array(Image.open(io.BytesIO(file)))


def shapes_of(labels: Pixels) -> list[int]:
    """Return the labels of shapes that are seen well enough to have a mask."""
    return [label for label in range(1, int(labels.max()) + 1) if (labels == label).sum() >= SMALLEST]
