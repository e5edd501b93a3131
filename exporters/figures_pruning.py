"""The pictures of pruning: scores of what was kept and removed, widths of every layer, loss of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .drawing import BLUE, GRID, INK, MUTED, ORANGE, new_figure, tidy
from .pruning_table import Layer, layers_of, shown_class, steps_of, widths_of

_ACROSS = 3  # panels side by side
_MOST_PANELS = 12
_PALE = "#e3e6ea"
_MOST_LABELS = 14

Floats = NDArray[np.float64]


def draw_scores(details: Mapping[str, Any]) -> Figure:
    """Draw how the scores of every class are spread, and which of its channels were removed.

    Args:
        details: of a pruning stage.
    """
    every = [entry for entry in details["classes"] if _total(entry)]
    count, steps = min(len(every), _MOST_PANELS), steps_of(details)
    found = [every[place * len(every) // count] for place in range(count)]
    across = min(_ACROSS, len(found))
    down = -(-len(found) // across)
    figure = new_figure(min(11.0, max(4.6, 3.6 * across)), 0.75 + 2.3 * down)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, entry in zip(panels, found, strict=False):
        _draw_histogram(axes, entry, steps)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    for axes in panels[len(found) - across : len(found)]:
        axes.set_xlabel("score")
    for axes in panels[::across]:
        axes.set_ylabel("channels")
    of = "every class" if len(found) == len(every) else f"{len(found)} of {len(every)} classes"
    when = "" if steps == 1 else f" in the last of {steps} steps"
    title = f"Scores in {of}: what competed, and what was removed{when}"
    figure.suptitle(title, fontsize=10.5, weight="bold", x=0.01, ha="left")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _total(entry: Mapping[str, Any]) -> int:
    histogram = entry.get("histogram") or {"kept": (), "removed": ()}
    return sum(histogram["kept"]) + sum(histogram["removed"])


def _draw_histogram(axes: Axes, entry: Mapping[str, Any], steps: int) -> None:
    edges: Floats = np.asarray(entry["histogram"]["edges"], dtype=float)
    kept: Floats = np.asarray(entry["histogram"]["kept"], dtype=float)
    removed: Floats = np.asarray(entry["histogram"]["removed"], dtype=float)
    widths = np.diff(edges)
    axes.bar(edges[:-1], kept, widths, align="edge", linewidth=0, color=BLUE, label="kept")
    axes.bar(edges[:-1], removed, widths, kept, align="edge", linewidth=0, color=ORANGE, label="removed")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(0, 1.06 * float((kept + removed).max()))
    before, after = entry["channels"] if steps == 1 else (_total(entry), int(kept.sum()))
    members = len(entry["members"])
    axes.set_title(shown_class(entry), fontsize=9, pad=16)
    of = f", {members} layers" if members > 1 else ""
    axes.annotate(
        f"{after:,} of {before:,} channels kept{of}", (0, 1), xycoords="axes fraction", xytext=(0, 4),
        textcoords="offset points", fontsize=7.5, color=MUTED,
    )  # fmt: skip
    tidy(axes)


def draw_widths(details: Mapping[str, Any]) -> Figure:
    """Draw how wide every layer was and is, a panel for each kind of width that changed.

    Args:
        details: of a pruning stage.
    """
    return draw_layer_widths({kind: layers_of(details, kind) for kind in widths_of(details)})


def draw_layer_widths(panels: Mapping[str, Sequence[Layer]]) -> Figure:
    """Draw widths of layers, before and after.

    Args:
        panels: kind of width -> its layers; at least one.
    """
    longest = max(len(layers) for layers in panels.values())
    figure = new_figure(min(11.0, max(5.2, 1.6 + 0.32 * longest)), 0.85 + 1.65 * len(panels))
    axes_list = figure.subplots(len(panels), 1, squeeze=False).ravel()
    for axes, (kind, layers) in zip(axes_list, panels.items(), strict=True):
        _draw_layers(axes, kind, layers)
        axes.set_xlim(-0.7, max(longest, 4) - 0.3)
    figure.suptitle("Width of every layer", fontsize=10.5, weight="bold", x=0.01, ha="left")
    axes_list[-1].set_xlabel("layer, in the order of the model")
    handles, labels = axes_list[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_layers(axes: Axes, kind: str, layers: Sequence[Layer]) -> None:
    places = np.arange(len(layers))
    before: Floats = np.array([layer.before for layer in layers], dtype=float)
    after: Floats = np.array([layer.after for layer in layers], dtype=float)
    axes.bar(places, before, width=0.78, color=_PALE, label="before")
    axes.bar(places, after, width=0.5, color=BLUE, label="after")
    if len(layers) <= 2 * _MOST_LABELS:
        for place, value in zip(places, after, strict=True):
            axes.annotate(
                f"{value:.0f}", (place, value), xytext=(0, 1.5), textcoords="offset points", ha="center",
                fontsize=7, color=INK,
            )  # fmt: skip
    stride = max(1, len(layers) // _MOST_LABELS)
    axes.set_xticks(places[::stride], [layer.label for layer in layers[::stride]])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(0, 1.14 * float(before.max()))
    axes.set_title(kind, fontsize=9, pad=4)
    tidy(axes)


def draw_training(details: Mapping[str, Any]) -> Figure:
    """Draw the loss of a recovery stage over its steps, with a running mean.

    Args:
        details: of a recovery stage, with `loss` [[step, value], ...].
    """
    steps: Floats = np.array([row[0] for row in details["loss"]], dtype=float)
    values: Floats = np.array([row[1] for row in details["loss"]], dtype=float)
    figure = new_figure(6.8, 3.0)
    axes = figure.subplots()
    window = max(1, len(values) // 12)
    axes.plot(steps, values, color="#c9d8ea" if window > 1 else BLUE, linewidth=1.2, label="as measured")
    if window > 1:
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color=BLUE, linewidth=1.8, label=f"mean of {window} values")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.set_title("Training after pruning")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.margins(x=0.02)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    tidy(axes)
    return figure
