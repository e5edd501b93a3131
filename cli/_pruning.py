"""What stages that removed channels, or trained afterwards, say of it: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..exporters.depth_table import removals
from ..exporters.pruning_table import (
    change,
    layers_of,
    prunings,
    recoveries,
    recovery_advice,
    shown_class,
    span,
    trained_on,
    widths_of,
)
from . import _depth
from ._tables import Section, Table
from ._units import amount

Document = Mapping[str, Any]

_COSTS = (
    ("parameters", "parameters"),
    ("macs", "multiply-accumulates"),
    ("paper_macs", "the same as papers on pruning count them"),
)


def sections(document: Document) -> Iterator[Section]:
    """Yield the blocks that stay, classes and widths of every pruning stage, then cost and training.

    Args:
        document: a report or a plan; nothing is yielded where nothing was removed or trained.
    """
    found, trained = prunings(document), recoveries(document)
    for stage in removals(document):
        yield from _depth.lines(stage)
        yield from _measured(stage)
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
    """Yield what was measured right after a stage that was not the last."""
    metrics = stage["details"].get("measured") or {}
    if "psnr_db" in metrics or "fid" in metrics:
        yield f"{stage['method']}: right after it: {', '.join(_of_samples(metrics))}"
        return
    parts = []
    if "accuracy" in metrics:
        parts.append(
            f"accuracy {metrics['accuracy']:.2%}, of the original {metrics['accuracy_original']:.2%}"
        )
    if "top1_agreement" in metrics:
        parts.append(f"{metrics['top1_agreement']:.2%} answered as the original does")
    if parts:
        yield f"{stage['method']}: right after it, on held-out images: {'; '.join(parts)}"


def _of_samples(metrics: Document) -> Iterator[str]:
    if "class_agreement" in metrics:
        before, after = metrics["class_agreement_original"], metrics["class_agreement"]
        yield f"class agreement {after:.1%}, of the original {before:.1%}"
        yield f"feature FID {metrics['fid']:.3f}, of the original {metrics['fid_original']:.3f}"
    if "psnr_db" in metrics:
        yield f"SQNR {metrics['sqnr_db']:.2f} dB, PSNR of samples {metrics['psnr_db']:.2f} dB"


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


def _costs_of(details: Document) -> Iterator[tuple[str, str, str, str]]:
    """Yield (what it is, before, after, share that is kept) of what a stage counted."""
    for key, name in _COSTS:
        if details.get(key):
            before, after = details[key]
            yield name, amount(before), amount(after), f"{after / before:.1%}"


def costs(stage: Document) -> Table:
    """Return a table of what the model took before a pruning stage, and after it."""
    rows = [[name, *cells] for name, *cells in _costs_of(stage["details"])]
    return Table("", ["", "before", "after", "kept"], rows)


def _cost(stage: Document) -> str:
    details = stage["details"]
    parts = [f"{name} {before} -> {after} ({kept})" for name, before, after, kept in _costs_of(details)]
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
    without = _left_out(details)
    steps = f"{details['steps']:,} steps{trained_on(details)}{without}{';' if without else ','}"
    return (
        f"{stage['method']}: {steps} training loss {first:.4g} -> {last:.4g} (means of the first and the last"
        " twelfth)"
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
