"""The pictures of a compressed key-value cache: singular values with ranks, and loss over the distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .drawing import BLUE, MUTED, ORANGE, new_figure, tidy

_DEPTH = LinearSegmentedColormap.from_list("depth", ["#b5cbe4", BLUE, "#12305a"])
_LEAST = 1e-4  # of the largest singular value: what lies below is not drawn
_SIDES = (("k", "keys", "rank_k"), ("v", "values", "rank_v"))

Floats = NDArray[np.float64]


def draw_singular_values(cache: Mapping[str, Any]) -> Figure:
    """Draw the singular values of every layer's keys and values, and mark how many are kept.

    Args:
        cache: what a stage that compressed the cache tells: `singular_values` and `layers`.
    """
    rows, ranks = cache["singular_values"], {row["name"]: row for row in cache["layers"]}
    figure = new_figure(7.6, 3.5)
    panels = figure.subplots(1, 2, sharey=True)
    colours = _DEPTH(np.linspace(0.0, 1.0, len(rows)))
    low = _lowest(rows)
    for axes, (side, name, rank) in zip(panels, _SIDES, strict=True):
        kept = [ranks[row["name"]][rank] for row in rows]
        for row, colour, count in zip(rows, colours, kept, strict=True):
            places, values = _points(row, side)
            axes.plot(places, values, color=colour, linewidth=1.4 if len(rows) <= 12 else 0.9, zorder=2)
            axes.plot(
                count,
                np.interp(count, places, values),
                marker="o",
                markersize=4,
                color=ORANGE,
                zorder=3,
                linestyle="none",
            )
        _mark_ranks(axes, kept)
        axes.set(xlabel="number of the singular value", yscale="log", ylim=(low * 0.8, 1.4))
        axes.set_xlim(0, max(row["of"] for row in rows) + 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_title(name, fontsize=9, pad=14)
        tidy(axes)
    panels[0].set_ylabel("share of the layer's largest")
    figure.suptitle(
        "Singular values of the cache, on the calibration text",
        fontsize=10.5,
        weight="bold",
        x=0.01,
        ha="left",
    )
    if len(rows) > 1:
        bar = figure.colorbar(ScalarMappable(Normalize(0, len(rows) - 1), _DEPTH), ax=panels, pad=0.02)
        bar.set_label("compressed layer, first to last", fontsize=8)
        bar.ax.tick_params(labelsize=7.5)
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        bar.outline.set_visible(False)
    return figure


def _lowest(rows: Sequence[Mapping[str, Any]]) -> float:
    least: float = min(value for row in rows for side, _, _ in _SIDES for value in row[side])
    return max(_LEAST, least)


def _points(row: Mapping[str, Any], side: str) -> tuple[Floats, Floats]:
    """Return the numbers of singular values, from 1, and the values; of many some at equal distances."""
    values: Floats = np.asarray(row[side], dtype=float)
    places: Floats = 1.0 + np.linspace(0.0, row["of"] - 1.0, len(values)).round().astype(np.float64)
    return places, values


def _mark_ranks(axes: Axes, kept: Sequence[int]) -> None:
    """Write what is kept above the panel, at a line where it is the same in every layer."""
    low, high = min(kept), max(kept)
    if low == high:
        axes.axvline(low, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    else:
        axes.axvspan(low, high, color=ORANGE, alpha=0.12, linewidth=0, zorder=0)
    text = f"rank {low}" if low == high else f"ranks {low} to {high}"
    axes.annotate(
        text, ((low + high) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", ha="center", fontsize=8, color=ORANGE,
    )  # fmt: skip


def draw_decoding(decoding: Mapping[str, Any], window: int) -> Figure:
    """Draw the mean loss of decoded tokens by their distance from the prompt, and what the cache adds to it.

    Args:
        decoding: of an evaluation: `by_distance` and `prompt`.
        window: tokens that are kept exactly.
    """
    rows = decoding["by_distance"]
    middles: Floats = np.array([(row["first"] + row["last"]) / 2 for row in rows])
    before: Floats = np.array([row["original"] for row in rows])
    after: Floats = np.array([row["compressed"] for row in rows])
    figure = new_figure(7.0, 4.0)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]})
    upper.plot(middles, before, color=MUTED, linewidth=1.8, marker="o", markersize=4, label="original")
    upper.plot(middles, after, color=BLUE, linewidth=1.8, marker="s", markersize=4, label="compressed cache")
    upper.set_ylabel("nats per token")
    upper.legend(loc="best", frameon=False, fontsize=8)
    width = np.array([row["last"] - row["first"] + 1 for row in rows]) * 0.86
    lower.bar(middles, after - before, width=width, color=BLUE)
    lower.axhline(0, color=MUTED, linewidth=0.8)
    lower.set(xlabel="tokens behind the prompt", ylabel="difference")
    lower.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    lower.set_xlim(rows[0]["first"] - 1, rows[-1]["last"] + 1)
    for axes in (upper, lower):
        tidy(axes)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    _mark_window(upper, lower, window - decoding["prompt"], rows)
    figure.suptitle(
        "Loss of decoded tokens by their distance from the prompt", fontsize=10.5, weight="bold", x=0.01,
        ha="left",
    )  # fmt: skip
    return figure


def _mark_window(upper: Axes, lower: Axes, inside: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put a line where the first token leaves the window: until there everything is exact."""
    if not rows[0]["first"] < inside < rows[-1]["last"]:
        return
    for axes in (upper, lower):
        axes.axvline(inside + 0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    upper.annotate(
        "beyond the window", (inside + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
        textcoords="offset points", fontsize=8, color=MUTED,
    )  # fmt: skip
