"""The pictures of bits: what every layer is stored in, how sensitive it is, and error over bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .drawing import BLUE, GRID, INK, MUTED, ORANGE, new_figure, tidy

# Dark to light in even steps, so that they are told apart in grey and by every kind of colour vision.
_BIT_STEPS = (2, 3, 4, 6, 8, 16, 32)
_BIT_COLOURS = ("#2d0a4f", "#3b4a8c", "#2a7f8e", "#4fb783", "#b5d95b", "#dcdfe4", "#eceff3")
_NUMBERED_BLOCKS = 16  # with more blocks there is no room for a number in every field
_WIDE_PANELS = 3
_EXACT_DB = 150.0  # what is as good as equal would squeeze everything else together

Floats = NDArray[np.float64]


def draw_bits(linears: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the stored bits of every linear by block and role, and the bytes of each role.

    Where several layers share a field, it shows their mean, weighted by weights.
    """
    inside = [row for row in linears if row["block"] is not None]
    roles = list(dict.fromkeys(row["role"] for row in inside))
    blocks = 1 + max(row["block"] for row in inside)
    total, weights = np.zeros((len(roles), blocks)), np.zeros((len(roles), blocks))
    before, after = np.zeros(len(roles)), np.zeros(len(roles))
    for row in inside:
        place = roles.index(row["role"])
        total[place, row["block"]] += row["weight_bits"] * row["parameters"]
        weights[place, row["block"]] += row["parameters"]
        before[place] += row["bytes_original"]
        after[place] += row["bytes"]
    grid = np.divide(total, weights, out=np.full_like(total, np.nan), where=weights > 0)
    width = min(11.0, 4.6 + 0.36 * blocks)
    figure = new_figure(width, 1.25 + 0.36 * len(roles))
    left, right = figure.subplots(1, 2, width_ratios=(max(2.4, 0.36 * blocks), 2.6), sharey=True)
    _draw_bit_grid(left, grid, roles)
    _draw_bytes(right, before, after)
    return figure


def _draw_bit_grid(axes: Axes, grid: Floats, roles: Sequence[str]) -> None:
    blocks = grid.shape[1]
    # A mean between two widths takes the colour of the nearer one.
    edges = [0.0, *((a + b) / 2 for a, b in zip(_BIT_STEPS, _BIT_STEPS[1:], strict=False)), 64.0]
    colours = ListedColormap(_BIT_COLOURS)
    axes.pcolormesh(
        np.arange(blocks + 1) - 0.5, np.arange(len(roles) + 1) - 0.5, np.ma.masked_invalid(grid),
        cmap=colours, norm=BoundaryNorm(edges, colours.N), edgecolors="white", linewidth=1.5,
    )  # fmt: skip
    if blocks <= _NUMBERED_BLOCKS:
        for (row, column), bits in np.ndenumerate(grid):
            if not np.isnan(bits):
                text = f"{bits:.0f}" if abs(bits - round(bits)) < 0.05 else f"{bits:.1f}"
                colour = "white" if bits < 5 else INK
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    _label_grid(axes, roles, blocks)
    axes.set_title("Bits of a stored weight")
    if blocks > _NUMBERED_BLOCKS:
        nearest = {int(np.searchsorted(edges, bits)) - 1 for bits in grid[~np.isnan(grid)]}
        patches = [Patch(color=_BIT_COLOURS[i], label=f"{_BIT_STEPS[i]} bits") for i in sorted(nearest)]
        axes.legend(handles=patches, ncols=len(patches), frameon=False, fontsize=8, loc="lower right",
                    bbox_to_anchor=(1.0, 1.0), handlelength=1.2, columnspacing=1.0)  # fmt: skip


def _label_grid(axes: Axes, roles: Sequence[str], blocks: int) -> None:
    axes.set_yticks(range(len(roles)), roles)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_xticks(range(0, blocks, max(1, blocks // 14)))
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.set_xlabel("block")
    axes.spines[:].set_visible(False)


def _draw_bytes(axes: Axes, before: Floats, after: Floats) -> None:
    unit, name = (1e6, "MB") if before.max() >= 2e6 else (1e3, "kB")
    places = np.arange(len(before))
    axes.barh(places, before / unit, height=0.7, color="#e3e6ea", label="original")
    axes.barh(places, after / unit, height=0.42, color=BLUE, label="compressed, scales included")
    axes.set_xlabel(f"{name} in all blocks")
    axes.set_title("Bytes")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0.3, 1.0), frameon=False, fontsize=7.5, borderaxespad=0.1)


def draw_sensitivity(layers: Sequence[Mapping[str, Any]], linears: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw what quantizing one layer alone costs, a panel for each number of bits.

    Args:
        layers: of the allocation, with the measured value at every number of bits.
        linears: gives every layer its role and block; those outside the blocks stand in front.
    """
    places = {row["name"]: (row["role"], row["block"]) for row in linears}
    measured = [row for row in layers if row["sensitivity"] and row["name"] in places]
    labels = sorted(
        {label for row in measured for label in row["sensitivity"]}, key=lambda text: int(text[1:])
    )
    roles = list(dict.fromkeys(places[row["name"]][0] for row in measured))
    blocks = 1 + max((places[row["name"]][1] or 0) for row in measured)
    outside = any(places[row["name"]][1] is None for row in measured)
    grids = {label: np.full((len(roles), blocks + outside), np.nan) for label in labels}
    for row in measured:
        role, block = places[row["name"]]
        column = 0 if block is None else block + outside
        for label, value in row["sensitivity"].items():
            worst, shown = grids[label][roles.index(role), column], _as_decibels(row["metric"], value)
            grids[label][roles.index(role), column] = np.fmin(worst, shown)
    return _panels(grids, roles, outside)


def _panels(grids: Mapping[str, Floats], roles: Sequence[str], outside: bool) -> Figure:
    """Draw one grid per number of bits; of many columns only the fewest, the middle and the most bits."""
    columns = next(iter(grids.values())).shape[1]
    labels = list(grids)
    if columns > _NUMBERED_BLOCKS and len(labels) > _WIDE_PANELS:
        labels = [labels[0], labels[len(labels) // 2], labels[-1]]
    each = max(1.7, 0.24 * columns)
    most = max(1, int((11.0 - 2.2) // each))
    rows = -(-len(labels) // most)
    across = -(-len(labels) // rows)
    figure = new_figure(min(11.0, 2.6 + each * across), rows * (0.75 + 0.26 * len(roles)) + 0.45)
    panels = figure.subplots(rows, across, squeeze=False).ravel()
    every = np.concatenate([grids[label][~np.isnan(grids[label])] for label in labels])
    norm = Normalize(float(every.min()), float(every.max()))
    mesh = None
    for index, (axes, label) in enumerate(zip(panels, labels, strict=False)):
        mesh = axes.pcolormesh(
            np.arange(columns + 1) - 0.5, np.arange(len(roles) + 1) - 0.5, np.ma.masked_invalid(grids[label]),
            cmap="magma", norm=norm, edgecolors="white", linewidth=0.6,
        )  # fmt: skip
        _label_grid(axes, roles, columns)
        if outside:
            shown = range(0, columns - 1, max(1, (columns - 1) // 7))
            axes.set_xticks([0, *(place + 1 for place in shown)], ["-", *map(str, shown)])
        axes.set_title(f"{label[1:]} bits", fontsize=9, pad=4)
        axes.tick_params(axis="y", labelleft=index % across == 0)
        if index + across < len(labels):
            axes.set_xlabel("")
            axes.tick_params(axis="x", length=0, labelbottom=False)
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.9, pad=0.015, fraction=0.03, aspect=28)
    bar.set_label("signal to error, dB", fontsize=8.5)
    bar.outline.set_visible(False)
    title = "One layer quantized alone: dark costs most"
    figure.suptitle(title, fontsize=10.5, weight="bold", x=0.01, ha="left")
    return figure


def _as_decibels(metric: str | None, value: float) -> float:
    """Return a measured value on one scale: SQNR as it is, similarity as -10 log10(1 - SSIM)."""
    if metric != "ssim":
        return value
    return -10.0 * math.log10(max(1.0 - value, 10 ** (-_EXACT_DB / 10)))


def draw_points(allocation: Mapping[str, Any]) -> Figure:
    """Draw measured error over bytes: what was tried for the budget, other budgets, and equal bits."""
    points = [point for point in allocation["points"] if point["sqnr_db"] < _EXACT_DB]
    largest = max(point["bytes"] for point in points)
    unit, name = (1e9, "GB") if largest >= 2e9 else (1e6, "MB") if largest >= 2e6 else (1e3, "kB")

    def coordinates(chosen: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
        return [point["bytes"] / unit for point in chosen], [point["sqnr_db"] for point in chosen]

    equal = [point for point in points if point["label"].startswith("all ")]
    tried = [point for point in points if point["for_this_budget"]]
    chosen = [point for point in points if point["chosen"]]
    others = [point for point in points if not point["for_this_budget"] and point not in equal]
    figure = new_figure(6.8, 3.8)
    axes = figure.subplots()
    front = [point for point in points if point["on_front"]]
    axes.plot(*coordinates(front), color="#b9c7d8", linewidth=1.4, zorder=1, label="front")
    axes.plot(*coordinates(others), linestyle="none", marker="o", markersize=5, color=BLUE,
              label="allocated, other budgets")  # fmt: skip
    axes.plot(*coordinates(equal), linestyle="none", marker="s", markersize=5.5, color=ORANGE,
              label="equal bits for all layers")  # fmt: skip
    if len(tried) > 1:
        axes.plot(*coordinates(tried), linestyle="none", marker="o", markersize=4.5, markerfacecolor="none",
                  color=INK, label="tried for this budget")  # fmt: skip
    axes.plot(*coordinates(chosen), linestyle="none", marker="*", markersize=14, color=INK, label="chosen")
    for point in equal:
        axes.annotate(
            point["label"].removeprefix("all "), (point["bytes"] / unit, point["sqnr_db"]), xytext=(6, -9),
            textcoords="offset points", fontsize=8, color=ORANGE,
        )  # fmt: skip
    limit = allocation["used"]["bytes_limit"]
    if limit is not None:
        axes.axvline(limit / unit, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("budget", (limit / unit, 0.01), xycoords=("data", "axes fraction"), xytext=(4, 2),
                      textcoords="offset points", fontsize=8, color=MUTED)  # fmt: skip
    axes.set(xlabel=f"{name} of all tensors", ylabel="SQNR of the output, dB")
    axes.set_title(f"Measured error over bytes ({allocation['objective_label']})")
    axes.margins(x=0.06, y=0.1)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    tidy(axes)
    return figure
