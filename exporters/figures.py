"""The pictures of a model card; equal measurements give equal bytes.

Drawn on `Figure` objects with the Agg canvas and matplotlib's own defaults, so that neither pyplot's
state nor a user's matplotlibrc has a say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ..evaluation.evaluator import Evaluation
from .layer_table import label_of

SAMPLES, TIMESTEPS, LAYERS, BITS = "samples.png", "sqnr_per_timestep.png", "layer_error.png", "bits.png"

_INK, _MUTED, _GRID = "#1f2933", "#69707a", "#e3e6ea"
_BLUE, _ORANGE = "#2f6db3", "#d9772b"
_DPI = 120
_COLUMNS = 8  # samples side by side
_ROLE_STYLES = (
    ("attention.q", "o", "#8a5fb0"), ("attention.k", "s", "#b58ad6"), ("attention.out", "D", "#5b3a80"),
    ("cross.q", "o", "#6aa56a"), ("cross.k", "s", "#9cc99c"), ("cross.out", "D", "#3e733e"),
    ("ff.in", "^", "#e2a15b"), ("ff.gate", ">", "#c98a3d"), ("ff.out", "v", "#a85a16"),
)  # fmt: skip
_BIT_STEPS = (2, 3, 4, 6, 8, 16, 32)
_BIT_COLOURS = ("#174a7c", "#2c66a0", "#4a86c5", "#7fb0de", "#b4d2ee", "#eceff3", "#dfe2e7")


@contextmanager
def _plain_defaults() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9, "axes.edgecolor": _MUTED, "axes.labelcolor": _INK, "text.color": _INK,
                "xtick.color": _MUTED, "ytick.color": _MUTED, "axes.titlesize": 10.5,
                "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
            }
        )  # fmt: skip
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # Without the Software entry, which names the version of matplotlib.
    figure.savefig(path, format="png", metadata={"Software": None})


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _pictures(images: Tensor, low: float, high: float) -> np.ndarray:
    """Return [n, H, W] or [n, H, W, 3] values in 0..1 of images [n, C, H, W]."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    values = ((shown.float() - low) / max(high - low, 1e-12)).clamp(0, 1).movedim(1, -1).numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def draw_samples(evaluation: Evaluation, label: str) -> Figure:
    """Draw original and compressed samples of equal seeds, one above the other.

    Args:
        evaluation: with its images.
        label: what the lower row is called, such as ``W4A8``.
    """
    original, compressed = evaluation.images["original"], evaluation.images["compressed"]
    latent = original.shape[1] not in (1, 3)
    low, high = (float(original.min()), float(original.max())) if latent else (-1.0, 1.0)
    rows = [_pictures(original, low, high), _pictures(compressed, low, high)]
    count = len(original)
    columns = min(count, _COLUMNS)
    chunks = -(-count // columns)
    figure = _figure(max(4.0, 0.55 + 0.86 * columns), 0.45 + chunks * 2.02)
    bands = figure.subfigures(chunks, 1, squeeze=False)[:, 0]
    for chunk, band in enumerate(bands):
        grid = band.subplots(2, columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        for row, column in np.ndindex(2, columns):
            axes, index = grid[row, column], chunk * columns + column
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if index >= count:
                continue
            axes.imshow(rows[row][index], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if row == 0 and index < len(evaluation.labels):
                axes.set_title(evaluation.labels[index], fontsize=8, weight="normal", loc="center", pad=3)
            if column == 0:
                axes.set_ylabel((label, "original")[row == 0], fontsize=8.5, color=_INK)
    kind = "latents (channels 1 to 3, not decoded)" if latent else "samples"
    figure.suptitle(f"{kind} of equal seeds", fontsize=10.5, weight="bold", x=0.01, ha="left")
    return figure


def draw_timesteps(details: Mapping[str, Any], metrics: Mapping[str, float]) -> Figure:
    """Draw the denoiser's SQNR over the sampling steps, noisiest first."""
    rows = details["timesteps"]
    steps = [row["timestep"] for row in rows]
    values = [row["sqnr_db"] for row in rows]
    figure = _figure(6.8, 3.2)
    axes = figure.subplots()
    axes.plot(steps, values, color=_BLUE, linewidth=1.8, marker="o", markersize=4)
    axes.axhline(metrics["sqnr_db"], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"all steps {metrics['sqnr_db']:.1f} dB", (0.995, metrics["sqnr_db"]), xytext=(0, 4),
        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8, color=_MUTED,
    )  # fmt: skip
    worst = int(np.argmin(values))
    axes.plot(steps[worst], values[worst], marker="o", markersize=7, color=_ORANGE)
    axes.annotate(
        f"worst {values[worst]:.1f} dB at t = {steps[worst]:g}", (steps[worst], values[worst]),
        xytext=(0, -14), textcoords="offset points", fontsize=8, color=_ORANGE,
        ha="left" if worst < len(steps) / 2 else "right",
    )  # fmt: skip
    axes.invert_xaxis()
    axes.margins(y=0.18)
    axes.set(xlabel="timestep (sampling runs to the right)", ylabel="SQNR of the output, dB")
    axes.set_title("Error of one denoiser call, on the original's inputs")
    _tidy(axes)
    return figure


def draw_layers(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the SQNR of every block's update, and of the linears inside it."""
    blocks = [row for row in rows if row["role"] == "block"]
    figure = _figure(min(11.0, max(6.8, 0.42 * len(blocks) + 3.0)), 3.6)
    axes = figure.subplots()
    axes.bar(
        [row["block"] for row in blocks], [row["sqnr_db"] for row in blocks],
        width=0.72, color="#c9d8ea", label="block's update",
    )  # fmt: skip
    for role, marker, colour in _ROLE_STYLES:
        points = [row for row in rows if row["role"] == role]
        if points:
            axes.plot(
                [row["block"] for row in points], [row["sqnr_db"] for row in points],
                linestyle="none", marker=marker, markersize=4.5, color=colour, label=role,
            )  # fmt: skip
    axes.set(xlabel="block", ylabel="SQNR, dB (higher is better)")
    axes.set_xticks([row["block"] for row in blocks][:: max(1, len(blocks) // 28)])
    axes.set_title("Where the error is made: every block on the original's own input")
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=8, handletextpad=0.5)
    _tidy(axes)
    return figure


def draw_bits(linears: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the stored bits of every linear by block and role, and the bytes of each role."""
    inside = [row for row in linears if row["block"] is not None]
    roles = list(dict.fromkeys(row["role"] for row in inside))
    blocks = 1 + max(row["block"] for row in inside)
    grid = np.full((len(roles), blocks), np.nan)
    before, after = np.zeros(len(roles)), np.zeros(len(roles))
    for row in inside:
        place = roles.index(row["role"])
        grid[place, row["block"]] = np.fmax(grid[place, row["block"]], row["weight_bits"])
        before[place] += row["bytes_original"]
        after[place] += row["bytes"]
    width = min(11.0, 4.6 + 0.36 * blocks)
    figure = _figure(width, 1.25 + 0.36 * len(roles))
    left, right = figure.subplots(1, 2, width_ratios=(max(2.4, 0.36 * blocks), 2.6), sharey=True)
    _draw_bit_grid(left, grid, roles)
    _draw_bytes(right, before, after)
    return figure


def _draw_bit_grid(axes: Axes, grid: np.ndarray, roles: Sequence[str]) -> None:
    blocks = grid.shape[1]
    edges = [*(step - 0.5 for step in _BIT_STEPS), _BIT_STEPS[-1] + 0.5]
    colours = ListedColormap(_BIT_COLOURS)
    axes.pcolormesh(
        np.arange(blocks + 1) - 0.5, np.arange(len(roles) + 1) - 0.5, np.ma.masked_invalid(grid),
        cmap=colours, norm=BoundaryNorm(edges, colours.N), edgecolors="white", linewidth=1.5,
    )  # fmt: skip
    if blocks <= 16:
        for (row, column), bits in np.ndenumerate(grid):
            if not np.isnan(bits):
                colour = "white" if bits <= 4 else _INK
                axes.text(column, row, f"{bits:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(roles)), roles)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.set_xticks(range(0, blocks, max(1, blocks // 14)))
    axes.set_ylim(len(roles) - 0.5, -0.5)
    axes.set_xlabel("block")
    axes.set_title("Bits of a stored weight")
    axes.spines[:].set_visible(False)
    present = sorted({int(bits) for bits in grid[~np.isnan(grid)]})
    if blocks > 16:
        patches = [
            Patch(color=_BIT_COLOURS[_BIT_STEPS.index(bits)], label=f"{bits} bits") for bits in present
        ]
        axes.legend(handles=patches, ncols=len(present), frameon=False, fontsize=8, loc="lower right",
                    bbox_to_anchor=(1.0, 1.0))  # fmt: skip


def _draw_bytes(axes: Axes, before: np.ndarray, after: np.ndarray) -> None:
    unit, name = (1e6, "MB") if before.max() >= 2e6 else (1e3, "kB")
    places = np.arange(len(before))
    axes.barh(places, before / unit, height=0.7, color="#e3e6ea", label="original")
    axes.barh(places, after / unit, height=0.42, color=_BLUE, label="compressed, scales included")
    axes.set_xlabel(f"{name} in all blocks")
    axes.set_title("Bytes")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0.3, 1.0), frameon=False, fontsize=7.5, borderaxespad=0.1)


def write_figures(folder: Path, evaluation: Evaluation, document: Mapping[str, Any]) -> list[str]:
    """Write the pictures for which there are measurements.

    Args:
        folder: of the checkpoint.
        evaluation: what was measured.
        document: the report; gives the name of what was made.

    Returns:
        The file names, in the order in which a card shows them.
    """
    details, metrics = evaluation.details, evaluation.metrics
    label = label_of(document["evaluation"].get("linears", ())) or "compressed"
    drawings: list[tuple[str, bool, Callable[[], Figure]]] = [
        (SAMPLES, bool(evaluation.images), lambda: draw_samples(evaluation, label)),
        (TIMESTEPS, bool(details.get("timesteps")), lambda: draw_timesteps(details, metrics)),
        (LAYERS, bool(details.get("layers")), lambda: draw_layers(details["layers"])),
        (BITS, any(row["block"] is not None for row in details.get("linears", ())),
         lambda: draw_bits(details["linears"])),
    ]  # fmt: skip
    written = []
    with _plain_defaults():
        for name, measured, draw in drawings:
            if measured:
                _save(draw(), folder / name)
                written.append(name)
    return written
