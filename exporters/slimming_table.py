"""What slimming a Segment Anything encoder tells, in the pieces that card, pictures and terminal share.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .pruning_table import Layer, span

Document = Mapping[str, Any]

COSTS = (
    ("parameters", "model", "parameters"),
    ("parameters", "encoder", "parameters of the image encoder"),
    ("macs", "encoder", "multiply-accumulates of the image encoder"),
    ("macs", "encoder_linear_conv", "the same without attention products, as the paper counts"),
    ("macs", "model", "multiply-accumulates of the model, for an image and a point"),
)
"""Where the details have a pair, before and after, and what it is of."""

_WIDTHS = {"embedding": "residual stream", "head_dim": "channels of a head", "inner": "feed-forward"}


def slimmings(document: Document) -> list[Document]:
    """Return the stages that slimmed an encoder, in order."""
    return [stage for stage in document.get("stages", ()) if _tells(stage.get("details") or {})]


def _tells(details: Document) -> bool:
    # A manifest is anybody's, and other methods may have details of these names.
    phases, widths = details.get("phases"), details.get("widths")
    return (
        isinstance(phases, list | tuple) and isinstance(widths, Mapping) and _WIDTHS.keys() <= widths.keys()
    )


def widths_of(details: Document) -> dict[str, list[Layer]]:
    """Return, of every kind of width, all that there are in the order of the model.

    Args:
        details: of a stage of `slimmings`.
    """
    found = details["widths"]
    rows = {"embedding": [found["embedding"]], **{key: found[key] for key in ("head_dim", "inner")}}
    return {
        name: [
            Layer("all" if key == "embedding" else str(place), before, after)
            for place, (before, after) in enumerate(rows[key])
        ]
        for key, name in _WIDTHS.items()
    }


def width_rows(details: Document) -> Iterator[tuple[str, int, str, str, str]]:
    """Yield (what, in how many layers, before, after, share that stays) of every kind of width."""
    for name, layers in widths_of(details).items():
        before, after = [layer.before for layer in layers], [layer.after for layer in layers]
        heads = f", {details['heads']} heads" if "head" in name else ""
        yield f"{name}{heads}", len(layers), span(before), span(after), f"{sum(after) / sum(before):.1%}"


def cost_rows(details: Document) -> Iterator[tuple[str, int, int]]:
    """Yield (what, before, after) of parameters, and of the work in both conventions."""
    for group, key, name in COSTS:
        before, after = details[group][key]
        yield name, before, after


def phase_rows(details: Document) -> Iterator[tuple[str, float, float | None]]:
    """Yield (phase, error of the encoder's output, mIoU or None) on the choice images, the original first."""
    rows = [{"name": "original", **details["before"]}, *details["phases"]]
    yield from ((row["name"], row["output_error"], row["miou"]) for row in rows)


def alignings(details: Document) -> list[Document]:
    """Return the phases that trained."""
    return [phase for phase in details["phases"] if phase["kind"] == "aligning"]


def differs(details: Document) -> bool:
    """Tell whether layers have widths of their own."""
    return any(len({layer.after for layer in layers}) > 1 for layers in widths_of(details).values())


def choice_told(choice: Document) -> str:
    """Say what the weights of an aligning were chosen by: "the mIoU of 120 masks of 50 images"."""
    images = f"{choice['images']:,} image{'s' if choice['images'] != 1 else ''}"
    if choice["by"] == "miou":
        return f"the mIoU of {choice['masks']:,} masks of {images}"
    return f"the output error of {images}"


def training_told(phase: Document) -> str:
    """Say how long an aligning took, and which of its weights stayed: "1,000 steps of 4 (20 epochs), ..."."""
    epochs = f"{phase['epochs']:.3g} epoch{'s' if phase['epochs'] != 1 else ''}"
    steps = f"{phase['steps']:,} steps of {phase['batch_size']} ({epochs})"
    if not phase["best_step"]:
        return f"{steps}; nothing was better than the weights from before"
    if phase["best_step"] == phase["steps"]:
        return f"{steps}; the last weights were the best"
    return f"{steps}; the weights of step {phase['best_step']:,} were the best"


def course(details: Document) -> Iterator[tuple[str, list[tuple[int, float]], int]]:
    """Yield (aligning, (step, value) on the choice images, place of the weights that stayed among these).

    Steps are counted through all alignings; each begins with what the pruning before it left.
    """
    key, before, left = details["choice"]["by"], 0, None
    for phase in details["phases"]:
        if phase["kind"] == "aligning":
            points = [(int(row[0]), float(row[1])) for row in phase["choice_values"]]
            if left is not None and points[0][0] > 0:
                points.insert(0, (0, left))
            best = max(place for place, (step, _) in enumerate(points) if step <= phase["best_step"])
            yield phase["name"], [(before + step, value) for step, value in points], best
            before += phase["steps"]
        left = phase[key]
