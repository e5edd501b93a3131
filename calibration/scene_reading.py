"""Reading one image of a scene and its masks, wherever they lie. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count

import numpy as np

from .decoding import ImageHead, Unreadable, decode_stream, head_of
from .mask_files import MAX_BYTES, Outline, read_outlines
from .scene_files import SceneFiles

_MAX_READERS = 8


def read_image(files: SceneFiles, row: int) -> np.ndarray:
    """Decode one image, upright: [height, width, 3] uint8.

    Raises:
        Unreadable: it cannot be read; with its name.
    """
    part = files.images[row]
    try:
        with part.open() as stream:
            return decode_stream(stream, part.where)
    except OSError as error:
        raise Unreadable(f"{part.where}: cannot be read: {error.strerror or error}") from None


def read_masks(files: SceneFiles, row: int) -> tuple[Outline, ...]:
    """Read the masks of one image; none where no file of masks lies beside it.

    Raises:
        Unreadable: the image or its masks cannot be read, or do not fit each other.
    """
    part = files.masks[row]
    head = _head(files, row)
    if part is None:
        return ()
    try:
        data = part.read(MAX_BYTES)
    except OSError as error:
        raise Unreadable(f"{part.where}: cannot be read: {error.strerror or error}") from None
    if data is None:
        raise Unreadable(f"{part.where}: larger than {MAX_BYTES:,} bytes")
    return read_outlines(data, part.where, head)


def look_at(files: SceneFiles, row: int, *, decode: bool) -> int:
    """Look whether one image and its masks can be read; return how many masks there are.

    Args:
        files: the images.
        row: which.
        decode: the image, too, not only its header.

    Raises:
        Unreadable: they cannot.
    """
    masks = read_masks(files, row)
    if decode:
        read_image(files, row)
    return len(masks)


def readers() -> ThreadPoolExecutor:
    """Return threads that read images: decoding them leaves other threads free to work."""
    return ThreadPoolExecutor(min(_MAX_READERS, cpu_count() or 1))


def unreadable_scenes(parts: Iterable[SceneFiles]) -> list[str]:
    """Decode all images and return what is wrong with those that cannot be read, in their order."""

    def problem(place: tuple[SceneFiles, int]) -> str:
        try:
            look_at(*place, decode=True)
        except Unreadable as error:
            return str(error)
        return ""

    places = [(files, row) for files in parts for row in range(len(files))]
    with readers() as pool:
        return [found for found in pool.map(problem, places) if found]


def has_masks(files: SceneFiles, row: int) -> bool:
    """Tell whether an image has masks that can be read."""
    try:
        return files.masks[row] is not None and len(read_masks(files, row)) > 0
    except Unreadable:
        return False


def _head(files: SceneFiles, row: int) -> ImageHead:
    part = files.images[row]
    try:
        with part.open() as stream:
            return head_of(stream, part.where)
    except OSError as error:
        raise Unreadable(f"{part.where}: cannot be read: {error.strerror or error}") from None
