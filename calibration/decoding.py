"""Decoding one image file that anyone may have written: few formats, bounded sizes."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from stat import S_ISREG

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 2**26
"""An image that claims more is refused before its pixels are decoded."""
MAX_ASPECT = 32
"""Resizing the short side of a narrower image would make it huge."""
_MODES = {1: "L", 3: "RGB"}
_MAX_READERS = 8
_DEEP = ("I", "F")
"""Modes of more than eight bits begin so; converting them would clip, not scale."""
_DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError),
    *(struct.error, zlib.error),
)
"""What Pillow raises for damaged files: its decoders have no common type."""


class Unreadable(Exception):
    """A file is no image that can be used; says which and why."""


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
        try:
            upright = ImageOps.exif_transpose(image).convert(_MODES[channels])
            pixels = np.asarray(upright, dtype=np.uint8)
        except _DAMAGED as error:
            raise Unreadable(f"{path}: cannot be decoded: {error}") from error
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


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


def _opened(path: Path) -> Image.Image:
    try:
        # A pipe or a device would keep whoever opens it waiting.
        if not S_ISREG(path.stat().st_mode):
            raise Unreadable(f"{path}: no regular file")
        with warnings.catch_warnings():
            # Sizes are judged below, by a limit of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise Unreadable(f"{path}: not an image that is read ({', '.join(FORMATS)})") from None
    except (*_DAMAGED, Image.DecompressionBombError) as error:
        raise Unreadable(f"{path}: cannot be read: {error}") from error
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
        raise Unreadable(f"{path}: {problem}")
    return image
