"""The pictures of slimming: what every phase cost and won back, and how wide every layer is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .drawing import BLUE, INK, MUTED, ORANGE, new_figure, tidy
from .figures_pruning import draw_layer_widths
from .slimming_table import Document, course, phase_rows, widths_of

_SECOND = "#8a5fb0"

Floats = NDArray[np.float64]


def draw_phases(details: Document) -> Figure:
    """Draw the error of the encoder's output after every phase, and the mIoU where masks were given.

    Below it stands the course of the alignings: what their weights were chosen by, over their steps.

    Args:
        details: of a stage of `slimmings`.
    """
    rows = list(phase_rows(details))[1:]  # the original has no error
    figure = new_figure(7.2, 4.9)
    above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": [1.0, 1.05]})
    _draw_errors(above, rows, [phase["kind"] for phase in details["phases"]])
    _draw_course(below, details)
    figure.suptitle(
        "What every phase cost and won back, on images that are not trained on",
        fontsize=10.5, weight="bold", x=0.01, ha="left",
    )  # fmt: skip
    return figure


def _draw_errors(axes: Axes, rows: Sequence[tuple[str, float, float | None]], kinds: Sequence[str]) -> None:
    places = np.arange(len(rows))
    errors: Floats = np.array([error for _, error, _ in rows])
    colours = [ORANGE if kind == "pruning" else BLUE for kind in kinds]
    axes.bar(places, errors, width=0.6, color=colours)
    for place, (_, error, miou) in zip(places, rows, strict=True):
        told = f"{error:.3g}" + ("" if miou is None else f"\nmIoU {miou:.3f}")
        axes.annotate(
            told, (place, error), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8,
            color=INK, linespacing=1.15,
        )  # fmt: skip
    axes.set_xticks(places, [name for name, _, _ in rows])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, 1.32 * float(errors.max()) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylabel("mean square error\nof the output")
    tidy(axes)


def _draw_course(axes: Axes, details: Document) -> None:
    by_masks = details["choice"]["by"] == "miou"
    end = 0
    for (name, points, best), colour in zip(course(details), (BLUE, _SECOND), strict=False):
        if end:
            axes.axvline(end, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=name)
        axes.plot(*points[best], marker="o", markersize=7, color=ORANGE, zorder=3)
        end = steps[-1]
    axes.plot(
        [], [], marker="o", markersize=7, color=ORANGE, linestyle="none", label="the weights that stayed"
    )
    axes.set(xlabel="optimizer step", ylabel="mIoU" if by_masks else "mean square error\nof the output")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02, y=0.12)
    if not by_masks:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right" if by_masks else "upper right")
    tidy(axes)


def draw_slim_widths(details: Document) -> Figure:
    """Draw how wide every layer was and is, where layers differ.

    Args:
        details: of a stage of `slimmings`.
    """
    panels = {name: layers for name, layers in widths_of(details).items() if len(layers) > 1}
    return draw_layer_widths(panels)
