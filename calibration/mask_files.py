"""The masks of one image as SA-1B has them: a JSON file of run lengths. Torch-free.

The file holds {"annotations": [{"segmentation": {"size": [height, width], "counts": ...}, "point_coords":
[[x, y]]}, ...]}. Counts are lengths of runs down the columns, zeros first: a list, or the text of the COCO
format, in which five bits a character hold them, from the fourth on as differences to the run two before.
Anyone may have written it: everything is bounded and summed up before a mask takes memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SourceError
from ..runtime.strict_json import parse_object
from .decoding import ImageHead, Unreadable

MAX_BYTES = 2**24
"""Of a file of masks; those of SA-1B have some megabytes at the most."""
MASKS_OF_AN_IMAGE = 32
"""So many of an image are used, the first ones."""
_MASK_PIXELS = 2**28
"""Of all masks of an image together, one byte each; of larger images fewer masks are used."""
_FIRST_CHARACTER, _BITS, _MOST_CHARACTERS = 48, 5, 6
_MOST_TEXT = 2**22
"""Characters of the runs of one mask; a million runs are no outline of an object."""
_MEASURED_PIXELS = 2**22
"""Of a mask whose inner point is sought; larger ones are thinned out first."""


@dataclass(frozen=True, eq=False)
class Outline:
    """One object, not yet drawn.

    Attributes:
        size: (height, width) of the image, pixels.
        runs: lengths of runs down the columns, zeros first: [n] int64, height * width together.
        point: (x, y) that was annotated, within the image; None: there is none.
    """

    size: tuple[int, int]
    runs: np.ndarray
    point: tuple[float, float] | None

    @property
    def area(self) -> int:
        """Pixels of the object."""
        return int(self.runs[1::2].sum())

    def mask(self) -> np.ndarray:
        """Return the object drawn: [height, width] bool."""
        values = np.arange(len(self.runs)) % 2 == 1
        height, width = self.size
        return np.ascontiguousarray(np.repeat(values, self.runs).reshape(width, height).T)

    def click(self, mask: np.ndarray) -> tuple[float, float]:
        """Return the annotated point, or the pixel that is farthest from the border of the object.

        Args:
            mask: of the object.
        """
        return inner_point(mask) if self.point is None else self.point


def read_outlines(data: bytes, where: str, head: ImageHead) -> tuple[Outline, ...]:
    """Read the objects of an image, the first `MASKS_OF_AN_IMAGE` that have an area.

    Masks belong to the image as it is seen, upright: so libraries and viewers show it, and so points are
    clicked. Where the rows in the file lie otherwise, the sizes must tell that the masks do not.

    Args:
        data: of the JSON file.
        where: what errors call it.
        head: of the image.

    Raises:
        Unreadable: not what the module says, or of another image size.
    """
    try:
        content = parse_object(data, where)
    except SourceError as error:
        raise Unreadable(error.message) from None
    entries = content.get("annotations")
    if not isinstance(entries, list):
        raise Unreadable(f"{where}: has no list `annotations`")
    height, width = head.size
    most = max(1, min(MASKS_OF_AN_IMAGE, _MASK_PIXELS // (height * width)))
    found: list[Outline] = []
    for index, entry in enumerate(entries):
        if len(found) == most:
            break
        try:
            outline = _outline(entry, head)
        except ValueError as error:
            raise Unreadable(f"{where}: annotations[{index}]: {error}") from None
        if outline.area:
            found.append(outline)
    return tuple(found)


def _outline(entry: Any, head: ImageHead) -> Outline:
    """Read one object.

    Raises:
        ValueError: with what is wrong.
    """
    segmentation = entry.get("segmentation") if isinstance(entry, Mapping) else None
    if not isinstance(segmentation, Mapping):
        raise ValueError("has no `segmentation` with `size` and `counts`")
    _check_size(segmentation.get("size"), head)
    height, width = head.size
    counts = segmentation.get("counts")
    runs = _coco_runs(counts) if isinstance(counts, str) else _listed_runs(counts)
    # Each is looked at before they are added up, so the sum cannot overflow.
    if len(runs) > height * width + 1 or (len(runs) and (runs.min() < 0 or runs.max() > height * width)):
        raise ValueError(f"runs are negative, too long or too many for {height} x {width} pixels")
    if int(runs.sum()) != height * width:
        raise ValueError(f"runs cover {int(runs.sum()):,} of {height * width:,} pixels")
    return Outline(head.size, runs, _point(entry.get("point_coords"), head.size))


def _check_size(size: Any, head: ImageHead) -> None:
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int for side in size):
        raise ValueError("segmentation.size is not [height, width]")
    given, (height, width) = tuple(size), head.size
    if given != head.size:
        turned = given == head.stored
        raise ValueError(
            f"the mask has {size[0]} x {size[1]} pixels (height x width), the image {height} x {width}"
            + (", upright as its camera says: save the image so" if turned else "")
        )
    if head.turned and head.stored == head.size:
        raise ValueError(
            "the camera says that the image is to be turned, and its size does not tell whether the masks"
            " are: save the image upright"
        )


def _listed_runs(counts: Any) -> np.ndarray:
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        raise ValueError("segmentation.counts is neither a text nor a list of whole numbers")
    if any(abs(count) >= 2**31 for count in counts):
        raise ValueError("a run of segmentation.counts is too long")
    return np.array(counts, dtype=np.int64)


def _coco_runs(text: str) -> np.ndarray:
    """Decode the text of the COCO format: [n] int64."""
    if len(text) > _MOST_TEXT:
        raise ValueError(f"segmentation.counts has {len(text):,} characters; {_MOST_TEXT:,} are read")
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - _FIRST_CHARACTER
    except UnicodeEncodeError:
        raise ValueError("segmentation.counts holds characters that are none of its format") from None
    if not len(codes):
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("segmentation.counts holds characters that are none of its format")
    last = codes < 32  # the others say that the number goes on
    if not last[-1]:
        raise ValueError("segmentation.counts ends within a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MOST_CHARACTERS:
        raise ValueError("a run of segmentation.counts is too long")
    shifts = _BITS * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 31) << shifts, starts)
    negative = (codes[ends] & 16) > 0
    values -= negative * (1 << (_BITS * lengths))
    # From the fourth on differences to the run two before: sums of every other value, the first left out.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _point(given: Any, size: tuple[int, int]) -> tuple[float, float] | None:
    """Return the first point; None where there is none, or it is not in the image."""
    first = given[0] if isinstance(given, list) and given else None
    if not isinstance(first, list) or len(first) != 2:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in first):
        return None
    x, y = first
    inside = math.isfinite(x) and math.isfinite(y) and 0 <= x < size[1] and 0 <= y < size[0]
    return (float(x), float(y)) if inside else None


def inner_point(mask: np.ndarray) -> tuple[float, float]:
    """Return the pixel (x, y) of an object that is farthest from its border; of equal ones the first by rows.

    The border of the image is one of the object, too. Objects of many pixels are thinned out before.

    Args:
        mask: [height, width] bool, not empty.
    """
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    box = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = max(1, math.ceil(math.sqrt(box.size / _MEASURED_PIXELS)))
    thinned = box[::step, ::step]
    if not thinned.any():  # thinner than the steps
        row, column = divmod(int(box.argmax()), box.shape[1])
        return float(left + column), float(top + row)
    distances = distance_transform_edt(np.pad(thinned, 1))[1:-1, 1:-1]
    row, column = divmod(int(distances.argmax()), thinned.shape[1])
    return float(left + step * column), float(top + step * row)
