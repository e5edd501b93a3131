"""Decoding one image file that anyone may have written: few formats, bounded sizes."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**26
"""An image that claims more is refused before its pixels are decoded."""
MAX_ASPECT = 32
"""Resizing the short side of a narrower image would make it huge."""
_MODES = {1: "L", 3: "RGB"}
_MAX_READERS = 8
_ORIENTATION = 0x0112
_UPRIGHT, _FIRST_ON_ITS_SIDE, _LAST_ORIENTATION = 1, 5, 8
_DEEP = ("I", "F")
"""Modes of more than eight bits begin so; converting them would clip, not scale."""
_DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError),
    *(struct.error, zlib.error),
)
"""What Pillow raises for damaged files: its decoders have no common type."""


class Unreadable(Exception):
    """A file is no image that can be used; says which and why."""


@dataclass(frozen=True)
class ImageHead:
    """What an image says of itself.

    Attributes:
        size: (height, width) in pixels, upright as its camera says.
        stored: (height, width) of the rows in the file.
        turned: whether upright and stored are different pictures, whatever their sizes.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    turned: bool


def check_header(path: Path) -> None:
    """Look at what a file says of itself, without decoding it.

    Raises:
        Unreadable: no image, too large, or of a kind that is not read.
    """
    with _opened(path):
        return


def decode(path: Path, channels: int) -> np.ndarray:
    """Decode an image, upright as its camera says.

    Args:
        path: the file; of one with several frames the first.
        channels: 1 (grey) or 3 (RGB); others are converted.

    Returns:
        [channels, height, width] uint8.

    Raises:
        Unreadable: see `check_header`; or the data is damaged.
    """
    with _opened(path) as image:
        pixels = _pixels(image, str(path), channels)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def head_of(stream: BinaryIO, where: str) -> ImageHead:
    """Look at what an image says of itself, without decoding it.

    Args:
        stream: of its bytes.
        where: what errors call it.

    Raises:
        Unreadable: as `check_header`.
    """
    with _image(stream, where) as image:
        try:
            orientation = image.getexif().get(_ORIENTATION, _UPRIGHT)
        except _DAMAGED as error:
            raise Unreadable(f"{where}: cannot be read: {error}") from error
        stored = (image.height, image.width)
    turned = orientation in range(_UPRIGHT + 1, _LAST_ORIENTATION + 1)
    size = stored[::-1] if turned and orientation >= _FIRST_ON_ITS_SIDE else stored
    return ImageHead(size, stored, turned)


def decode_stream(stream: BinaryIO, where: str) -> np.ndarray:
    """Decode an image, upright as its camera says.

    Args:
        stream: of its bytes.
        where: what errors call it.

    Returns:
        [height, width, 3] uint8; grey images have three equal channels.

    Raises:
        Unreadable: as `decode`.
    """
    with _image(stream, where) as image:
        return _pixels(image, where, 3)


def unreadable(paths: Sequence[Path], channels: int) -> list[str]:
    """Decode files and return what is wrong with those that cannot be, in their order.

    Args:
        paths: of the files.
        channels: see `decode`.
    """

    def problem(path: Path) -> str:
        try:
            decode(path, channels)
        except Unreadable as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(_MAX_READERS, cpu_count() or 1)) as readers:
        return [found for found in readers.map(problem, paths) if found]


def _pixels(image: Image.Image, where: str, channels: int) -> np.ndarray:
    try:
        upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
        return np.asarray(upright, dtype=np.uint8)
    except _DAMAGED as error:
        raise Unreadable(f"{where}: cannot be decoded: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        # A pipe or a device would keep whoever opens it waiting.
        if not S_ISREG(path.stat().st_mode):
            raise Unreadable(f"{path}: no regular file")
        stream = path.open("rb")
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read: {error}") from error
    with stream, _image(stream, str(path)) as image:
        yield image


def _image(stream: BinaryIO, where: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Sizes are judged below, by a limit of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        raise Unreadable(f"{where}: not an image that is read ({', '.join(FORMATS)})") from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise Unreadable(f"{where}: cannot be read: {error}") from error
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded"
    elif max(width, height) > MAX_ASPECT * min(width, height):
        problem = f"{width} x {height} pixels; the longer side is more than {MAX_ASPECT} times the shorter"
    elif image.mode.startswith(_DEEP):
        problem = f"more than eight bits a channel (mode {image.mode})"
    if problem is not None:
        image.close()
        raise Unreadable(f"{where}: {problem}")
    return image
