"""The pictures of depth pruning: how a learned choice settled, and which blocks stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .depth_table import Blocks, blocks_of, chooses, places_told, several_lists
from .drawing import BLUE, INK, MUTED, ORANGE, new_figure, tidy

_PALE = "#e3e6ea"
_SURE = LinearSegmentedColormap.from_list("sure", ["#f3f6fa", "#a9c4e4", BLUE])
_MOST_PLACES = 6  # written out in the label of a group
_IN_A_ROW = 32  # blocks of a strip
_MOST_GROUPS = 40

Floats = NDArray[np.float64]


def draw_choices(details: Mapping[str, Any]) -> Figure:
    """Draw how sure a search was of every group's choice over its steps, and when the choice changed.

    Args:
        details: of a stage that learned which blocks stay.
    """
    rows = [place for place, row in enumerate(details["choices"]) if chooses(row)]
    shown = rows[:_MOST_GROUPS]
    steps: Floats = np.array([note[0] for note in details["decisions"]], dtype=float)
    sure: Floats = np.array([[note[2][place] for place in shown] for note in details["decisions"]]).T
    figure = new_figure(7.6, 1.45 + 0.27 * len(shown))
    axes = figure.subplots()
    edges: Floats = np.concatenate([[0.0], steps])
    mesh = axes.pcolormesh(edges, np.arange(len(shown) + 1), sure, cmap=_SURE, vmin=0, vmax=1)
    _mark_changes(axes, details["decisions"], shown, steps)
    axes.set_ylim(len(shown), 0)  # the first group above
    axes.hlines(range(1, len(shown)), 0, float(steps[-1]), color="white", linewidth=1.5)
    labels = [_group(details["choices"][place], several_lists(details)) for place in shown]
    axes.set_yticks(np.arange(len(shown)) + 0.5, labels, fontsize=8)
    axes.tick_params(length=0)
    right = axes.secondary_yaxis("right")
    ends = [_end(details["choices"][place]) for place in shown]
    right.set_yticks(np.arange(len(shown)) + 0.5, ends, fontsize=8, color=INK)
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("optimizer step")
    axes.annotate(
        "kept (probability)", (1, 1), xycoords="axes fraction", xytext=(3, 8), textcoords="offset points",
        fontsize=8, color=MUTED, va="center",
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    of = "every group" if len(shown) == len(rows) else f"the first {len(shown)} of {len(rows)} groups"
    # Over the whole figure: above the axes there may be the legend.
    figure.suptitle(f"How sure the search was of {of}", fontsize=10.5, weight="bold", x=0.01, ha="left")
    bar = figure.colorbar(mesh, ax=axes, shrink=min(1.0, 2.2 / (0.27 * len(shown) + 0.4)), pad=0.02)
    bar.set_label("probability of its choice", fontsize=8)
    bar.ax.tick_params(labelsize=7.5)
    bar.outline.set_visible(False)
    return figure


def _mark_changes(axes: Axes, notes: Sequence[Sequence[Any]], shown: Sequence[int], steps: Floats) -> None:
    """Put a line where the choice of a group is another than at the note before."""
    label = "the choice changed"
    for line, place in enumerate(shown):
        for step, (before, after) in zip(steps, pairwise(notes), strict=False):
            if before[1][place] != after[1][place]:
                axes.plot([step, step], [line + 0.1, line + 0.9], color=ORANGE, linewidth=2.2, label=label)
                label = ""
    if not label:
        axes.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, handlelength=0.8,
            borderaxespad=0.2,
        )  # fmt: skip


def _group(row: Mapping[str, Any], with_list: bool) -> str:
    places = row["of"]
    consecutive = places == list(range(places[0], places[-1] + 1))
    span = f"{places[0]} to {places[-1]}" if consecutive and len(places) > 1 else places_told(places)
    return f"{row['blocks']} {span}" if with_list else f"blocks {span}"


def _end(row: Mapping[str, Any]) -> str:
    kept = row["kept"]
    told = places_told(kept) if len(kept) <= _MOST_PLACES else f"{len(kept)} of {len(row['of'])}"
    return f"{told} ({row['confidence']:.2f})"


def draw_kept(details: Mapping[str, Any], *, again: bool = False) -> Figure:
    """Draw which blocks stay, and their scores where a rule went by them.

    Args:
        details: of a stage that removed blocks.
        again: whether a stage before it removed blocks as well, so that these are not the original's.
    """
    rows, scores = blocks_of(details), details.get("scores") or {}
    longest = max(min(row.of, _IN_A_ROW) for row in rows)
    heights = [1.9 if row.name in scores else 0.16 + 0.27 * _lines(row) for row in rows]
    figure = new_figure(max(4.6, 0.95 + 0.27 * longest), 0.8 + sum(heights))
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": heights}).ravel()
    for axes, row in zip(panels, rows, strict=True):
        if row.name in scores:
            _draw_scores(axes, row, scores[row.name])
        else:
            _draw_strip(axes, row, longest)
        name = f"{row.name}: {_counted(row)}" if len(rows) > 1 else ""
        axes.set_title(name, fontsize=8.5, weight="normal", pad=3)
    said = "Blocks that stay" if len(rows) > 1 else f"Blocks that stay: {_counted(rows[0])}"
    said += "\nof those that the stage before it left" if again else ""
    figure.suptitle(said, fontsize=10.5, weight="bold", x=0.01, ha="left")
    keys = [Rectangle((0, 0), 1, 1, color=BLUE), Rectangle((0, 0), 1, 1, color=_gone(row.name in scores))]
    figure.legend(
        keys, ["kept", "removed"], loc="outside lower left", ncols=2, frameon=False, fontsize=8,
        handlelength=1.0, handleheight=1.0,
    )  # fmt: skip
    return figure


def _counted(row: Blocks) -> str:
    return f"{len(row.kept)} of {row.of}"


def _gone(scored: bool) -> str:
    """Return the colour of what went: seen as a bar as well."""
    return ORANGE if scored else _PALE


def _lines(row: Blocks) -> int:
    return -(-row.of // _IN_A_ROW)


def _draw_strip(axes: Axes, row: Blocks, longest: int) -> None:
    for place in range(row.of):
        line, column = divmod(place, _IN_A_ROW)
        stays = place in row.kept
        axes.add_patch(Rectangle((column + 0.04, line + 0.06), 0.92, 0.88, color=BLUE if stays else _PALE))
        axes.text(
            column + 0.5, line + 0.52, str(place), ha="center", va="center", fontsize=7.5,
            color="white" if stays else MUTED,
        )  # fmt: skip
    axes.set(xlim=(0, longest), ylim=(_lines(row), 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_scores(axes: Axes, row: Blocks, scores: Sequence[float]) -> None:
    colours = [BLUE if place in row.kept else ORANGE for place in range(row.of)]
    axes.bar(range(row.of), scores, color=colours, width=0.8)
    axes.set(xlabel="block", ylabel="score", xlim=(-0.7, row.of - 0.3))
    axes.set_xticks(range(0, row.of, max(1, row.of // _IN_A_ROW)))
    axes.tick_params(axis="x", length=0, labelsize=7.5)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    tidy(axes)
