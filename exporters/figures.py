"""The pictures of a model card; equal measurements give equal bytes.

Drawn on `Figure` objects with the Agg canvas and matplotlib's own defaults, so that neither pyplot's
state nor a user's matplotlibrc has a say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ..calibration.similarity import PERFECT_DB
from ..evaluation.evaluator import Evaluation
from .depth_table import is_learned, removals
from .drawing import BLUE, INK, MUTED, ORANGE, new_figure, plain_defaults, save, tidy
from .experts_table import expert_stages
from .figures_bits import draw_bits, draw_points, draw_sensitivity
from .figures_depth import draw_choices, draw_kept
from .figures_experts import chooses_experts, draw_experts, draw_fitness, searches
from .figures_kv import draw_decoding, draw_singular_values
from .figures_masks import draw_masks
from .figures_pruning import draw_scores, draw_training, draw_widths
from .figures_slimming import draw_phases, draw_slim_widths
from .kv_table import cache_of, decoding_of, kv_stages
from .layer_table import allocation_of, has_quantizer, label_of, mixed_label_of
from .pruning_table import numbered, prunings, recoveries, widths_of
from .slimming_table import differs, slimmings

MASKS = "masks.png"
SAMPLES, TIMESTEPS, LAYERS, BITS = "samples.png", "sqnr_per_timestep.png", "layer_error.png", "bits.png"
SENSITIVITY, POINTS = "sensitivity.png", "error_over_bytes.png"
SCORES, WIDTHS, TRAINING = "scores.png", "widths.png", "training_loss.png"
SLIMMING = "slimming.png"
KEPT, CHOICES = "blocks.png", "choices.png"
EXPERTS, FITNESS = "experts.png", "fitness.png"
SINGULAR_VALUES, DECODING = "kv_singular_values.png", "decoding.png"
ORDER = (
    SAMPLES, MASKS, TIMESTEPS, LAYERS, BITS, SENSITIVITY, POINTS, KEPT, CHOICES, EXPERTS, FITNESS, SLIMMING,
    WIDTHS, SCORES, SINGULAR_VALUES, DECODING, TRAINING,
)  # fmt: skip
"""In which a card shows the pictures."""

_COLUMNS = 8  # samples side by side
_ROLE_STYLES = (
    ("attention.q", "o", "#8a5fb0"), ("attention.k", "s", "#b58ad6"), ("attention.out", "D", "#5b3a80"),
    ("cross.q", "o", "#6aa56a"), ("cross.k", "s", "#9cc99c"), ("cross.out", "D", "#3e733e"),
    ("ff.in", "^", "#e2a15b"), ("ff.gate", ">", "#c98a3d"), ("ff.out", "v", "#a85a16"),
    ("projection", "P", "#4c7fb3"), ("conv", "X", "#3a3f4a"), ("conv.shortcut", "*", "#8a919e"),
)  # fmt: skip


def _pictures(images: Tensor, low: float, high: float) -> np.ndarray:
    """Return [n, H, W] or [n, H, W, 3] values in 0..1 of images [n, C, H, W]."""
    shown = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    values = ((shown.float() - low) / max(high - low, 1e-12)).clamp(0, 1).movedim(1, -1).numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def draw_samples(evaluation: Evaluation, label: str) -> Figure:
    """Draw samples of equal seeds, one above the other: original, between stages, compressed.

    Args:
        evaluation: with its images.
        label: what the lowest row is called, such as ``W4A8``; lines of text.
    """
    original = evaluation.images["original"]
    names = [label if name == "compressed" else name.replace(" ", "\n", 1) for name in evaluation.images]
    latent = original.shape[1] not in (1, 3)
    low, high = (float(original.min()), float(original.max())) if latent else (-1.0, 1.0)
    rows = [_pictures(images, low, high) for images in evaluation.images.values()]
    count = len(original)
    columns = min(count, _COLUMNS)
    chunks = -(-count // columns)
    narrowest = 4.6 if latent else 4.0  # the title must fit
    figure = new_figure(
        max(narrowest, 0.55 + 0.86 * columns), 0.45 + chunks * (2.02 + 0.85 * (len(rows) - 2))
    )
    bands = figure.subfigures(chunks, 1, squeeze=False)[:, 0]
    for chunk, band in enumerate(bands):
        spaces = {"wspace": 0.03, "hspace": 0.03}
        grid = band.subplots(len(rows), columns, squeeze=False, gridspec_kw=spaces)
        for row, column in np.ndindex(len(rows), columns):
            axes, index = grid[row, column], chunk * columns + column
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if index >= count:
                continue
            axes.imshow(rows[row][index], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if row == 0 and index < len(evaluation.labels):
                axes.set_title(evaluation.labels[index], fontsize=8, weight="normal", loc="center", pad=3)
            if column == 0:
                axes.set_ylabel(names[row], fontsize=8.5, color=INK)
    kind = "latents of equal seeds (channels 1 to 3)" if latent else "samples of equal seeds"
    figure.suptitle(kind, fontsize=10.5, weight="bold", x=0.01, ha="left")
    return figure


def draw_timesteps(details: Mapping[str, Any], metrics: Mapping[str, float]) -> Figure:
    """Draw the denoiser's SQNR over the sampling steps, noisiest first."""
    rows = details["timesteps"]
    steps = [row["timestep"] for row in rows]
    values = [row["sqnr_db"] for row in rows]
    figure = new_figure(6.8, 3.2)
    axes = figure.subplots()
    axes.plot(steps, values, color=BLUE, linewidth=1.8, marker="o", markersize=4)
    axes.axhline(metrics["sqnr_db"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"all steps {metrics['sqnr_db']:.1f} dB", (0.995, metrics["sqnr_db"]), xytext=(0, 4),
        xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8, color=MUTED,
    )  # fmt: skip
    worst = int(np.argmin(values))
    axes.plot(steps[worst], values[worst], marker="o", markersize=7, color=ORANGE)
    axes.annotate(
        f"worst {values[worst]:.1f} dB at t = {steps[worst]:g}", (steps[worst], values[worst]),
        xytext=(0, -14), textcoords="offset points", fontsize=8, color=ORANGE,
        ha="left" if worst < len(steps) / 2 else "right",
    )  # fmt: skip
    axes.invert_xaxis()
    axes.margins(y=0.18)
    axes.set(xlabel="timestep (sampling runs to the right)", ylabel="SQNR of the output, dB")
    axes.set_title("Error of one denoiser call, on the original's inputs")
    tidy(axes)
    return figure


def draw_layers(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the SQNR of every block's update, and of the linears inside it."""
    blocks = [row for row in rows if row["role"] == "block"]
    figure = new_figure(min(11.0, max(6.8, 0.42 * len(blocks) + 3.0)), 3.6)
    axes = figure.subplots()
    axes.bar(
        [row["block"] for row in blocks], [row["sqnr_db"] for row in blocks],
        width=0.72, color="#c9d8ea", label="block's update",
    )  # fmt: skip
    drawn = [style for style in _ROLE_STYLES if any(row["role"] == style[0] for row in rows)]
    # A stage of a U-Net has many layers of a role: there each role gets a place of its own.
    crowded = len({(row["role"], row["block"]) for row in rows}) < len(rows)
    for place, (role, marker, colour) in enumerate(drawn):
        points = [row for row in rows if row["role"] == role]
        aside = 0.6 * ((place + 0.5) / len(drawn) - 0.5) if crowded else 0.0
        axes.plot(
            [row["block"] + aside for row in points], [row["sqnr_db"] for row in points],
            linestyle="none", marker=marker, markersize=4.5, color=colour, label=role,
        )  # fmt: skip
    axes.set(xlabel=_counted_on(blocks), ylabel="SQNR, dB (higher is better)")
    axes.set_xticks([row["block"] for row in blocks][:: max(1, len(blocks) // 28)])
    axes.set_title("Where the error is made: every block on the original's own input")
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), frameon=False, fontsize=8, handletextpad=0.5)
    tidy(axes)
    return figure


def _counted_on(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Say what the numbers of blocks mean: those of several lists are counted on."""
    first: dict[str, int] = {}
    for row in blocks:
        name, _, place = row["name"].rpartition(".")
        if not place.isdecimal() or "." in name:
            return "block"  # of a U-Net: no plain list
        first.setdefault(name, row["block"])
    if len(first) < 2:
        return "block"
    return f"block: {', '.join(f'{name} from {place}' for name, place in first.items())}"


Drawing = tuple[str, bool, Callable[[], Figure]]
"""File name, whether there is something to draw, what draws it."""


def _of_pruning(document: Mapping[str, Any]) -> Iterator[Drawing]:
    """Yield the pictures of every stage that removed or trained; later ones of a kind are numbered."""
    for number, stage in enumerate(prunings(document), 1):
        details = stage["details"]
        scored = any(entry.get("histogram") for entry in details["classes"])
        yield numbered(WIDTHS, number), bool(widths_of(details)), partial(draw_widths, details)
        yield numbered(SCORES, number), scored, partial(draw_scores, details)
    for number, stage in enumerate(removals(document), 1):
        yield numbered(KEPT, number), True, partial(draw_kept, stage["details"], again=number > 1)
    learned = [stage["details"] for stage in removals(document) if is_learned(stage["details"])]
    for number, details in enumerate(learned, 1):
        yield numbered(CHOICES, number), True, partial(draw_choices, details)
    for number, stage in enumerate(expert_stages(document), 1):
        details = stage["details"]
        drawn = partial(draw_experts, details, again=number > 1)
        yield numbered(EXPERTS, number), chooses_experts(details), drawn
        yield numbered(FITNESS, number), searches(details), partial(draw_fitness, details)
    for number, stage in enumerate(slimmings(document), 1):
        details = stage["details"]
        yield numbered(SLIMMING, number), True, partial(draw_phases, details)
        yield numbered(WIDTHS, number), differs(details), partial(draw_slim_widths, details)
    for number, stage in enumerate(recoveries(document), 1):
        yield numbered(TRAINING, number), True, partial(draw_training, stage["details"])


def _of_cache(document: Mapping[str, Any]) -> Iterator[Drawing]:
    """Yield the pictures of a compressed key-value cache."""
    for stage in kv_stages(document)[-1:]:  # a cache is compressed once
        cache, found = cache_of(stage), decoding_of(document)
        spread = bool(cache.get("singular_values"))
        yield SINGULAR_VALUES, spread, partial(draw_singular_values, cache)
        yield DECODING, found is not None, partial(draw_decoding, found or {}, cache["window"])


def figures_in(folder: Path) -> list[str]:
    """Return the names of the pictures that `write_figures` put into a folder, in the order of a card."""
    found = []
    for name in ORDER:
        number = 1
        while (folder / numbered(name, number)).is_file():
            found.append(numbered(name, number))
            number += 1
    return found


def made_of(document: Mapping[str, Any]) -> str:
    """Return what the samples of a result are called beside those of the original."""
    mixed = mixed_label_of(document)
    scheme = f"{mixed} mixed" if mixed else label_of(document["evaluation"].get("linears", ()))
    if scheme is None and has_quantizer(document):
        scheme = "quantized"
    cut = "pruned" if prunings(document) or removals(document) or expert_stages(document) else None
    cut = "slimmed" if slimmings(document) else cut
    trained = "trained" if recoveries(document) else None
    return "\n".join(filter(None, (cut, trained, scheme))) or "compressed"


def _differs(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether anything differs: blocks that are left of a model, and were not trained, do not."""
    return any(row["sqnr_db"] < PERFECT_DB for row in rows)


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
    allocation = allocation_of(document) or {}
    label = made_of(document)
    inside = [row for row in details.get("linears", ()) if row["block"] is not None]
    drawings: list[Drawing] = [
        (SAMPLES, bool(evaluation.images), lambda: draw_samples(evaluation, label)),
        (MASKS, bool(evaluation.masks), lambda: draw_masks(evaluation.masks, label)),
        (TIMESTEPS, bool(details.get("timesteps")), lambda: draw_timesteps(details, metrics)),
        (LAYERS, _differs(details.get("layers", ())), lambda: draw_layers(details["layers"])),
        (BITS, label_of(inside) is not None,
         lambda: draw_bits(details["linears"])),
        (SENSITIVITY, any(row["sensitivity"] for row in allocation.get("layers", ())),
         lambda: draw_sensitivity(allocation["layers"], details["linears"])),
        (POINTS, bool(allocation.get("points")), lambda: draw_points(allocation)),
        *_of_pruning(document),
        *_of_cache(document),
    ]  # fmt: skip
    written = []
    with plain_defaults():
        for name, measured, draw in drawings:
            if measured:
                save(draw(), folder / name)
                written.append(name)
    return [name for name in figures_in(folder) if name in written]
