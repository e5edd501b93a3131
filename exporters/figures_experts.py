"""The pictures of expert pruning: fitness over the evaluations of a search, and which experts stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .drawing import BLUE, INK, MUTED, ORANGE, new_figure, tidy
from .experts_table import ORIGINAL, RANDOM, counts_told, experts_of, removes

_PALE = "#e3e6ea"
_KINDS = (
    ("random", "random", "o", "#9aa1ab"), ("given", "choice of a rule", "D", ORANGE),
    ("mutation", "changed", "o", "#8fb4dd"), ("crossover", "of two parents", "s", "#a07cc0"),
)  # fmt: skip
_RULES = {"frequency": "frequency", "soft_activation": "soft activation", "naee": "NAEE"}
_FURTHER = 2.0  # times what the better 95 of 100 differ by: so far below these is drawn
_LEAST_HEIGHT = 1.0  # points
_LINE = 0.052  # of the height of the axes: what a line of text takes
_SHARES = LinearSegmentedColormap.from_list("shares", ["#f3f6fa", "#a9c4e4", BLUE])
_WRITTEN = 16  # columns up to which the coefficients are written into the squares
_EDGED = 64  # columns up to which the squares have edges
_TICKS = 16
_CROWDED = 0.2  # inches of a row below which not every layer has its number

Floats = NDArray[np.float64]


def searches(details: Mapping[str, Any]) -> bool:
    """Tell whether a stage has evaluations to draw."""
    return bool((details.get("search") or {}).get("history"))


def chooses_experts(details: Mapping[str, Any]) -> bool:
    """Tell whether a stage has a choice or coefficients to draw."""
    return removes(details) or bool(details.get("mixing"))


def draw_fitness(details: Mapping[str, Any]) -> Figure:
    """Draw the fitness of every evaluation, the best so far, and what it is compared with.

    Args:
        details: of a stage that searched.
    """
    search, fitness = details["search"], details["fitness"]
    history = search["history"]
    values: Floats = np.array([np.nan if row["fitness"] is None else row["fitness"] for row in history])
    figure = new_figure(7.6, 3.9)
    axes = figure.subplots()
    lines = _levels(details)
    floor = _floor(values, [level for _, level in lines])
    places = np.arange(1, len(history) + 1)
    for kind, label, marker, colour in _KINDS:
        mine = np.array([row["kind"] == kind for row in history])
        if kind == "given" and not any(row.get("name") in _RULES for row in history):
            label = "experts as they were"  # nothing is removed, and the search begins with the model itself
        if mine.any():
            axes.plot(
                places[mine & (values >= floor)], values[mine & (values >= floor)], linestyle="none",
                marker=marker, markersize=4.5 if kind == "given" else 3.2, color=colour, label=label,
                zorder=4 if kind == "given" else 2,
            )  # fmt: skip
    best: Floats = np.array([np.nan if row["best"] is None else row["best"] for row in history])
    axes.step(places, best, where="post", color=BLUE, linewidth=1.8, label="best so far", zorder=3)
    axes.set_xlim(0, len(history) + 1)
    _set_height(axes, [*values[values >= floor], *(level for _, level in lines)])
    _mark_merging(axes, search["prune_evals"], len(history))
    _mark_levels(
        axes, lines, {**_RULES, RANDOM: "random, mean", ORIGINAL: f"all {details['experts_before']} experts"}
    )
    axes.set(xlabel="evaluation", ylabel=f"points on {fitness['train']:,} train items")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    tidy(axes)
    figure.suptitle("Fitness over the search", fontsize=10.5, weight="bold", x=0.01, ha="left")
    handles, labels = axes.get_legend_handles_labels()
    title = _left_out(values, floor)
    figure.legend(
        handles, labels, loc="outside lower left", ncols=5, frameon=False, fontsize=8, title=title,
        title_fontsize=7.5, alignment="left",
    )  # fmt: skip
    return figure


def _floor(values: Floats, levels: Sequence[float]) -> float:
    """Return the least fitness that is drawn: a few broken models would press all others together."""
    finite = values[~np.isnan(values)]
    low, best = float(np.quantile(finite, 0.05)), float(finite.max())
    least = float(finite.min())
    return max(least, min([low - _FURTHER * (best - low), *levels])) if best > low else least


def _left_out(values: Floats, floor: float) -> str | None:
    """Say how many evaluations are not drawn."""
    failed, below = int(np.isnan(values).sum()), int((values < floor).sum())
    parts = [f"{failed:,} without finite outputs"] * bool(failed) + [f"{below:,} further down"] * bool(below)
    return f"not drawn: {', '.join(parts)}" if parts else None


def _set_height(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    # Differences that only break ties are not blown up to the height of the picture.
    room = max(0.05 * (high - low), (_LEAST_HEIGHT - (high - low)) / 2)
    axes.set_ylim(low - room, high + room)
    axes.ticklabel_format(axis="y", useOffset=False)


def _mark_merging(axes: Axes, first: int, count: int) -> None:
    """Put a line before the first evaluation that merges; none where all or none do."""
    if not 0 < first < count:
        return
    axes.axvline(first + 0.5, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        "merging begins", (first + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, 3),
        textcoords="offset points", fontsize=8, color=MUTED,
    )  # fmt: skip


def _levels(details: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (row, fitness on the train items) of what is no evaluation of its own, highest first."""
    found = [
        (row["name"], float(row["train"]))
        for row in details["scores"]
        if row["name"] in (ORIGINAL, RANDOM, *_RULES) and row.get("train") is not None
    ]
    return sorted(found, key=lambda line: -line[1])


def _mark_levels(axes: Axes, lines: Sequence[tuple[str, float]], names: Mapping[str, str]) -> None:
    """Draw a line at every level, and its name at the right, moved down where names would touch."""
    low, high = axes.get_ylim()
    wanted = [(level - low) / (high - low) for _, level in lines]
    for (row, level), place in zip(lines, _apart(wanted), strict=True):
        colour = INK if row == ORIGINAL else ORANGE if row in _RULES else MUTED
        axes.axhline(level, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            f"{names[row]} {level:.3g}", (1, (level - low) / (high - low)), xycoords="axes fraction",
            xytext=(1.03, place), textcoords="axes fraction", fontsize=8, color=colour, va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip


def _apart(wanted: Sequence[float]) -> list[float]:
    """Return falling places at least a line of text apart, within 0 to 1 and near the wanted ones."""
    found: list[float] = []
    for place in wanted:
        found.append(min([place, *(found[-1:] and [found[-1] - _LINE])]))
    for index in reversed(range(len(found))):
        least = _LINE * (len(found) - 1 - index)
        found[index] = max(found[index], least)
    return found


def draw_experts(details: Mapping[str, Any], *, again: bool = False) -> Figure:
    """Draw which experts of every layer stay, or how much of each went into those that stay.

    Args:
        details: of a stage that removed or merged experts.
        again: whether a stage before it did so as well, so that these are not the original's.
    """
    kept, of, mixing = experts_of(details), details["experts_before"], details.get("mixing")
    values = _amounts(kept, of, mixing)
    tall = 0.23 if of <= _EDGED else 0.1
    figure = new_figure(min(11.0, max(4.8, 1.2 + 0.34 * of)), 1.3 + min(10.0, tall * len(kept)))
    axes = figure.subplots()
    edges: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.8} if of <= _EDGED else {}
    colours = _SHARES if mixing else ListedColormap([_PALE, BLUE])
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0.0, vmax=max(1.0, float(values.max())), **edges)
    _label(axes, list(kept), of, tall)
    _part_groups(axes, list(kept), details.get("groups", ()))
    title = counts_told(details).partition(";")[0]
    told = f"{title[0].upper()}{title[1:]}" + ("\nof those that the stage before it left" if again else "")
    figure.suptitle(told, fontsize=10.5, weight="bold", x=0.01, ha="left")
    keys = [Rectangle((0, 0), 1, 1, color=BLUE), Rectangle((0, 0), 1, 1, color=_PALE)]
    names = ["stays", "removed"]
    if mixing:
        _write(axes, kept, values)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("sum of |coefficients|", fontsize=8)
        bar.ax.tick_params(labelsize=7.5)
        bar.outline.set_visible(False)
        keys, names = (
            [Rectangle((0, 0), 1, 1, fill=False, edgecolor=INK, linewidth=1.3)],
            ["weighs most in the router" if details.get("router") == "free" else "stays in the router"],
        )
    figure.legend(
        keys, names, loc="outside lower left", ncols=2, frameon=False, fontsize=8, handlelength=1.0,
        handleheight=1.0,
    )  # fmt: skip
    return figure


def _amounts(
    kept: Mapping[int, Sequence[int]], of: int, mixing: Mapping[str, Sequence[Sequence[float]]] | None
) -> Floats:
    """Return [layers, experts]: 1 for those that stay; of merged ones the sum of their |coefficients|."""
    if mixing:
        return np.stack([np.abs(np.asarray(mixing[str(layer)], dtype=float)).sum(axis=0) for layer in kept])
    values: Floats = np.zeros((len(kept), of))
    for row, experts in enumerate(kept.values()):
        values[row, list(experts)] = 1.0
    return values


def _label(axes: Axes, layers: Sequence[int], of: int, tall: float) -> None:
    axes.set(xlabel="expert, as numbered before", ylabel="layer", xlim=(0, of), ylim=(len(layers), 0))
    columns = range(0, of, max(1, of // _TICKS))
    axes.set_xticks([place + 0.5 for place in columns], list(map(str, columns)))
    rows = range(0, len(layers), 1 if tall > _CROWDED else 4)
    axes.set_yticks([place + 0.5 for place in rows], [str(layers[place]) for place in rows])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _part_groups(axes: Axes, layers: Sequence[int], groups: Sequence[str]) -> None:
    """Draw a line between groups of several layers, which share their choice."""
    if len(groups) in (0, 1, len(layers)):
        return
    lasts = {int(name.rpartition(".")[2].rpartition("-")[2]) for name in groups}
    for place, layer in enumerate(layers[:-1], 1):
        if layer in lasts:
            axes.axhline(place, color=INK, linewidth=1)


def _write(axes: Axes, kept: Mapping[int, Sequence[int]], values: Floats) -> None:
    """Frame the experts that stay, and write into every square what it stands for, where there is room."""
    for row, experts in enumerate(kept.values()):
        for expert in experts:
            axes.add_patch(
                Rectangle((expert + 0.04, row + 0.06), 0.92, 0.88, fill=False, edgecolor=INK, linewidth=1.3)
            )
    if values.shape[1] > _WRITTEN:
        return
    for row, column in np.ndindex(*values.shape):
        axes.text(
            column + 0.5, row + 0.52, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=6.5,
            color="white" if values[row, column] > 0.75 else MUTED,
        )  # fmt: skip
