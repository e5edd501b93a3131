"""What stages that removed channels, or trained afterwards, say of it: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..exporters.pruning_table import (
    change,
    layers_of,
    prunings,
    recoveries,
    recovery_advice,
    shown_class,
    span,
    widths_of,
)
from ._tables import Section, Table
from ._units import amount

Document = Mapping[str, Any]

_COSTS = (
    ("parameters", "parameters"),
    ("macs", "multiply-accumulates"),
    ("paper_macs", "the same as papers on pruning count them"),
)


def sections(document: Document) -> Iterator[Section]:
    """Yield a table of classes and widths for every pruning stage, then lines on cost and training.

    Args:
        document: a report or a plan; nothing is yielded where nothing was removed or trained.
    """
    found, trained = prunings(document), recoveries(document)
    for stage in found:
        yield removed(stage)
        yield _cost(stage)
        yield from _compared(stage)
        yield from _measured(stage)
    for stage in trained:
        yield training(stage)
        yield from _measured(stage)


def advice(document: Document) -> Iterator[str]:
    """Yield what a report's reader should do before the model is used; a plan has it among its notes."""
    methods = [stage["method"] for stage in document["stages"]]
    found = recovery_advice(methods, document["model"]["family"])
    if found is not None:
        yield found


def _measured(stage: Document) -> Iterator[str]:
    """Yield what was measured on held-out images right after a stage that was not the last."""
    metrics = stage["details"].get("measured") or {}
    parts = []
    if "accuracy" in metrics:
        parts.append(
            f"accuracy {metrics['accuracy']:.2%}, of the original {metrics['accuracy_original']:.2%}"
        )
    if "top1_agreement" in metrics:
        parts.append(f"{metrics['top1_agreement']:.2%} answered as the original does")
    if parts:
        yield f"{stage['method']}: right after it, on held-out images: {'; '.join(parts)}"


def removed(stage: Document) -> Table:
    """Return a table of the classes of a pruning stage, and of heads and their channels."""
    details = stage["details"]
    rows = [
        [shown_class(entry), str(len(entry["members"])), *_counts(entry["channels"]), _span(entry["members"])]
        for entry in details["classes"]
    ]
    for kind in widths_of(details):
        if kind not in ("heads", "head channels"):  # others are classes already
            continue
        layers = layers_of(details, kind)
        total = (sum(layer.before for layer in layers), sum(layer.after for layer in layers))
        rows.append([kind, str(len(layers)), *_counts(total), span([layer.after for layer in layers])])
    columns = ["what competed", "layers", "before", "after", "kept", "per layer"]
    return Table(f"{stage['method']}: removed", columns, rows)


def _counts(pair: Sequence[int]) -> list[str]:
    before, after = pair
    return [f"{before:,}", f"{after:,}", f"{after / before:.1%}"]


def _span(members: Sequence[Document]) -> str:
    return span([member["after"] for member in members])


def costs(stage: Document) -> Table:
    """Return a table of what the model took before a pruning stage, and after it."""
    details = stage["details"]
    rows = []
    for key, name in _COSTS:
        pair = details.get(key)
        if pair:
            rows.append([name, *(amount(value) for value in pair), f"{pair[1] / pair[0]:.1%}"])
    return Table("", ["", "before", "after", "kept"], rows)


def _cost(stage: Document) -> str:
    details = stage["details"]
    parts = []
    for key, name in _COSTS:
        pair = details.get(key)
        if pair:
            parts.append(f"{name} {amount(pair[0])} -> {amount(pair[1])} ({pair[1] / pair[0]:.1%})")
    if details.get("samples"):
        parts.append(f"scored on {details['samples']:,} calibration samples")
    elif details["importance"] == "magnitude":
        parts.append("scored by the weights alone")
    return f"{stage['method']}: {', '.join(parts)}"


def _compared(stage: Document) -> Iterator[str]:
    details = stage["details"]
    loss = details.get("loss") or {}
    if loss.get("after") is None:
        return
    rows = [f"{details['ranking']} {loss['after']:.5g}"]
    rows += [f"{name} {row['loss']:.5g}" for name, row in (details.get("baselines") or {}).items()]
    before = "" if loss.get("before") is None else f"{loss['before']:.5g} before; "
    yield f"{stage['method']}: loss on the calibration samples: {before}after: {', '.join(rows)}"


def training(stage: Document) -> str:
    """Say how long a recovery stage trained, and how its loss fell."""
    details = stage["details"]
    first, last = change(details["loss"])
    images = details.get("images")
    on = f" on {images:,} images" if isinstance(images, int) else ""
    without = _left_out(details)
    return (
        f"{stage['method']}: {details['steps']:,} steps{on}{without}{';' if without else ','} training"
        f" loss {first:.4g} -> {last:.4g} (means of the first and the last twelfth)"
    )


def _left_out(details: Document) -> str:
    """Say how many images a training left out, and why; empty: none."""
    parts: list[str] = []
    for key, one, many in (
        ("skipped", "cannot be read and is", "cannot be read and are"),
        ("held_out", "is a held-out image and is", "are held-out images and are"),
    ):
        count = details.get(key)
        if count:
            parts.append(f"; {count:,} more {one if count == 1 else many} left out")
    return "".join(parts)
