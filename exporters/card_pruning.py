"""The card's account of pruning: what was removed, by which scores, at what cost, what trained it then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .card_depth import removed_blocks
from .card_subject import Subject
from .depth_table import earlier, removals
from .markdown import code, sentence, table
from .pruning_table import (
    Document,
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

_SCORES = {
    "taylor": "the size of weight times summed gradient (Taylor)",
    "magnitude": "the squared size of the weights (magnitude)",
}
_RANKINGS = {
    "isomorphic": "Isomorphic sub-structures of all layers compete among themselves (arXiv 2407.04616).",
    "global": "All sub-structures of a kind compete, whatever their form (a baseline).",
    "local": "Every layer competes with itself alone (a baseline).",
}
_LOSSES = {
    "cross_entropy": "cross-entropy with the labels",
    "pseudo_labels": "cross-entropy with the original's own answers",
    "output_norm": "mean square of the outputs",
    "denoising": "error of the denoiser on its own samples",
}


def pruning(subject: Subject) -> Iterator[str]:
    """Yield the section on what was removed and trained, or nothing where nothing was."""
    found, trained = prunings(subject.document), recoveries(subject.document)
    shorter = removals(subject.document) or earlier(subject.document)
    if not found and not trained and not shorter:
        return
    yield from ("## What was removed" if found or shorter else "## What was trained", "")
    yield from removed_blocks(removals(subject.document), subject)
    for stage in found:
        yield from _stage(stage)
    yield from _recovery(trained)
    yield from _advice(subject)
    yield from _between(subject.document)


def _stage(stage: Document) -> Iterator[str]:
    details = stage["details"]
    yield f"By {code(stage['method'])}. {_RANKINGS.get(details['ranking'], details['ranking'])}"
    yield f"A channel is scored by {_SCORES.get(details['importance'], details['importance'])}."
    yield from _scored_on(details)
    yield ""
    header = ("what competed", "layers", "channels before", "after", "kept", "per layer, after")
    yield from table(header, _classes(details))
    yield from table(("width", "layers", "before", "after", "kept"), _widths(details))
    yield from table(("", "before", "after", "kept"), _totals(details))
    yield from _losses(details)


def _scored_on(details: Document) -> Iterator[str]:
    samples, loss = details.get("samples"), (details.get("loss") or {}).get("name")
    if details["importance"] == "taylor" and samples:
        what = f" of {_LOSSES.get(loss, loss)}" if loss else ""
        yield f"The gradients{what} were summed over {samples:,} calibration samples."


def _classes(details: Document) -> Iterator[tuple[object, ...]]:
    for entry in details["classes"]:
        before, after = entry["channels"]
        widths = span([member["after"] for member in entry["members"]])
        yield (
            shown_class(entry), len(entry["members"]), f"{before:,}", f"{after:,}", f"{after / before:.1%}",
            widths,
        )  # fmt: skip


def _widths(details: Document) -> Iterator[tuple[object, ...]]:
    for kind in widths_of(details):
        layers = layers_of(details, kind)
        before, after = sum(layer.before for layer in layers), sum(layer.after for layer in layers)
        yield (kind, len(layers), f"{before:,}", f"{after:,}", f"{after / before:.1%}")


def _totals(details: Document) -> Iterator[tuple[object, ...]]:
    rows = (
        ("parameters", "parameters"),
        ("macs", "multiply-accumulates of one forward, attention products included"),
        ("paper_macs", "the same, counted as the papers on pruning do"),
    )
    for key, name in rows:
        pair = details.get(key)
        if pair:
            yield (name, f"{pair[0]:,}", f"{pair[1]:,}", f"{pair[1] / pair[0]:.1%}")


def _losses(details: Document) -> Iterator[str]:
    """Tell what removing cost, beside what other rankings would have, at equal work."""
    loss = details.get("loss") or {}
    rows: list[tuple[object, ...]] = []
    if loss.get("after") is not None:
        before = "" if loss.get("before") is None else f"{loss['before']:.5g}"
        rows.append((f"**{details['ranking']}**", before, f"{loss['after']:.5g}", f"{details['macs'][1]:,}"))
    for name, other in (details.get("baselines") or {}).items():
        rows.append((name, "", f"{other['loss']:.5g}", f"{other['macs']:,}"))
    if rows:
        yield "Loss on the calibration samples right after removing, nothing trained:"
        yield ""
        yield from table(("ranking", "loss before", "loss after", "multiply-accumulates"), rows)


def _recovery(trained: Sequence[Document]) -> Iterator[str]:
    for stage in trained:
        details = stage["details"]
        first, last = change(details["loss"])
        steps = f"{details['steps']:,} steps{trained_on(details)}"
        yield f"Trained afterwards by {code(stage['method'])}: {steps}; training loss"
        yield f"{first:.4g} on average over its first twelfth, {last:.4g} over its last."
        yield from _left_out(details)
        yield ""


def _advice(subject: Subject) -> Iterator[str]:
    methods = [stage["method"] for stage in subject.document["stages"]]
    advice = recovery_advice(methods, subject.model["family"])
    if advice is not None:
        yield from (f"**{sentence(advice)}**", "")


def _left_out(details: Document) -> Iterator[str]:
    """Say which images of a training's place it did not see."""
    if details.get("skipped"):
        yield f"Files left out because they cannot be read: {details['skipped']:,}."
    if details.get("held_out"):
        yield f"Images left out because they are held out for measuring: {details['held_out']:,}."


_MEASURES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("class_agreement", "class agreement", "{:.1%}"),
    ("fid", "feature FID", "{:.3f}"),
    ("psnr_db", "PSNR of final samples, dB", "{:.2f}"),
    ("sqnr_db", "SQNR of the output, dB", "{:.2f}"),
)


def _numbers(document: Document) -> Iterator[str]:
    """Yield " 1", " 2", ... for stages of which there are several by one method, and nothing for others."""
    methods = [stage["method"] for stage in document["stages"]]
    for index, method in enumerate(methods):
        yield f" {methods[: index + 1].count(method)}" if methods.count(method) > 1 else ""


def _between(document: Document) -> Iterator[str]:
    """Yield what was measured between the stages, beside original and result; nothing where it was not."""
    metrics: Mapping[str, Any] = document["evaluation"].get("metrics", {})
    rows: list[tuple[str, Mapping[str, Any]]] = [
        (f"after {code(stage['method'])}{again}", stage["details"]["measured"])
        for stage, again in zip(document["stages"], _numbers(document), strict=True)
        if (stage.get("details") or {}).get("measured")
    ]
    # Of a classifier the one figure that people ask for; a denoiser has no such figure.
    measured = [row for row in _MEASURES if row[0] in metrics][: 1 if "accuracy" in metrics else None]
    if not measured or not (rows or "accuracy" in metrics):
        return
    original = {key: metrics[f"{key}_original"] for key, _, _ in measured if f"{key}_original" in metrics}
    rows = [("original", original), *rows, ("this checkpoint", metrics)]
    cells = [
        (name, *(form.format(values[key]) if key in values else "" for key, _, form in measured))
        for name, values in rows
        if any(key in values for key, _, _ in measured)
    ]
    yield from table(("", *(title for _, title, _ in measured)), cells)
