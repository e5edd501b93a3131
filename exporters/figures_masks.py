"""The picture of a model that segments: masks of original and result at the same points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ..evaluation.mask_examples import MaskExample
from .drawing import BLUE, INK, MUTED, ORANGE, new_figure

_COLUMN_INCHES = 1.6
_TEXT_INCHES = {0: 0.06, 1: 0.24, 2: 0.38}  # lines below a row -> height
_FLATTEST, _TALLEST = 0.5, 1.4  # height / width of a cell
_NARROW = 3  # prompts beside which a sentence does not fit on one line
_FADED = 0.45  # share of the picture that is left outside a mask
_OPACITY = 0.62  # of a mask
_TRUTH = "#4a4f57"
_FINE = 360  # pixels of a longer side up to which small images are enlarged
_Mask = NDArray[np.bool_]
_Values = TypeVar("_Values", bound=np.generic)


def draw_masks(examples: Sequence[MaskExample], label: str) -> Figure:
    """Draw prompts side by side: the image, the original's mask, the result's, and the true one where known.

    Args:
        examples: at least one.
        label: what the result is called; lines of text.
    """
    true = any(example.truth is not None for example in examples)
    rows: list[tuple[str, Callable[[MaskExample], NDArray[np.uint8]], Callable[[MaskExample], str]]] = [
        ("image", lambda example: example.image, lambda _: ""),
        ("original", lambda example: _overlaid(example.image, example.original, BLUE), _original_told),
        (label, _result, lambda example: _result_told(example, two_lines=true)),
    ]
    if true:
        rows.append(("true mask", _truth, lambda _: ""))
    lines = [0, 1 if true else 0, 2 if true else 1, 0][: len(rows)]
    height = _COLUMN_INCHES * _shape(examples)
    figure = new_figure(
        max(4.6, 0.5 + _COLUMN_INCHES * len(examples)), 0.7 + sum(height + _TEXT_INCHES[n] for n in lines)
    )
    grid = figure.subplots(len(rows), len(examples), squeeze=False)
    for row, (name, painted, told) in enumerate(rows):
        for column, example in enumerate(examples):
            _draw_cell(grid[row, column], painted(example), example, told(example))
        grid[row, 0].set_ylabel(name, fontsize=8.5, color=INK)
    figure.suptitle("Masks at a point", fontsize=10.5, weight="bold", x=0.01, ha="left")
    notes = (
        "IoU: intersection over union.",
        "The blue line on the result is the edge of the original's mask.",
    )
    figure.supxlabel(
        ("\n" if len(examples) <= _NARROW else " ").join(notes), fontsize=7.5, color=MUTED, x=0.01, ha="left",
        multialignment="left",
    )  # fmt: skip
    figure.set_layout_engine("constrained", h_pad=0.02, hspace=0.01)
    return figure


def _draw_cell(axes: Axes, picture: NDArray[np.uint8], example: MaskExample, told: str) -> None:
    height, width = example.image.shape[:2]
    # In pixels of the image, in which the point is, whatever the picture was enlarged to.
    axes.imshow(picture, interpolation="antialiased", extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.plot(
        *example.point, marker="o", markersize=5.5, color="white", markeredgecolor="black",
        markeredgewidth=1.3, scalex=False, scaley=False,
    )  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(told, fontsize=7.5, labelpad=2)


def _original_told(example: MaskExample) -> str:
    return "" if example.original_iou is None else f"IoU {example.original_iou:.2f} with the truth"


def _result_told(example: MaskExample, *, two_lines: bool) -> str:
    told = f"IoU {example.agreement:.2f} with original"
    if not two_lines:
        return told
    return told + ("\n" if example.result_iou is None else f"\nIoU {example.result_iou:.2f} with the truth")


def _result(example: MaskExample) -> NDArray[np.uint8]:
    return _overlaid(example.image, example.result, ORANGE, example.original)


def _truth(example: MaskExample) -> NDArray[np.uint8]:
    return example.image if example.truth is None else _overlaid(example.image, example.truth, _TRUTH)


def _shape(examples: Sequence[MaskExample]) -> float:
    """Return height / width of a cell in which every image has room."""
    tallest = max(example.image.shape[0] / example.image.shape[1] for example in examples)
    return min(max(tallest, _FLATTEST), _TALLEST)


def _overlaid(
    image: NDArray[np.uint8], mask: _Mask, colour: str, line: _Mask | None = None
) -> NDArray[np.uint8]:
    """Return the image, pale and grey, with a mask in a colour, and perhaps the edge of another in blue."""
    image, mask = _enlarged(image), _enlarged(mask)
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    values = np.repeat(255.0 - _FADED * (255.0 - grey), 3, axis=2)
    values[mask] = _OPACITY * _rgb(colour) + (1.0 - _OPACITY) * grey[mask]
    width = max(1, round(max(mask.shape) / 160))
    values[_edge(mask, width)] = _rgb(colour)
    if line is not None:
        values[_edge(_enlarged(line), width)] = _rgb(BLUE)
    return values.round().astype(np.uint8)


def _enlarged(values: NDArray[_Values]) -> NDArray[_Values]:
    """Return pixels [h, w, ...] as squares of pixels where there are few: edges are thin lines then."""
    times = max(1, _FINE // max(values.shape[:2]))
    return values.repeat(times, axis=0).repeat(times, axis=1)


def _edge(mask: _Mask, width: int) -> _Mask:
    """Return the outermost pixels of a mask, so many deep; the border of the image counts as outside."""
    inside = np.pad(mask, 1)
    for _ in range(width):
        inner = inside.copy()
        for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
            inner &= np.roll(inside, shift, axis)
        inside = inner
    found: _Mask = mask & ~inside[1:-1, 1:-1]
    return found


def _rgb(colour: str) -> NDArray[np.float32]:
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)], dtype=np.float32)
