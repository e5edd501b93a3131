"""What stages that removed channels, or trained afterwards, say of it: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..exporters.pruning_table import change, layers_of, prunings, recoveries, shown_class, span, widths_of
from ._tables import Section, Table
from ._units import amount

Document = Mapping[str, Any]

FINE_TUNING_REQUIRED = "fine-tuning required: nothing in this recipe trains the model after it is pruned"

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
        yield _table(stage)
        yield _cost(stage)
        yield from _compared(stage)
    for stage in trained:
        yield _training(stage)
    if found and not _recovers(document, found[-1]):
        yield FINE_TUNING_REQUIRED


def _recovers(document: Document, last: Document) -> bool:
    """Tell whether a stage of the recipe trains after the last one that removes."""
    from ..recipes.stages import STAGES

    stages = list(document["stages"])
    later = stages[stages.index(last) + 1 :]
    phases = {STAGES[stage["method"]].phase for stage in later if stage["method"] in STAGES}
    return "recover" in phases or bool(recoveries({"stages": later}))


def _table(stage: Document) -> Table:
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
        parts.append("scored by the weights alone, on 0 calibration samples")
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


def _training(stage: Document) -> str:
    details = stage["details"]
    first, last = change(details["loss"])
    images = details.get("images")
    on = f" on {images:,} images" if isinstance(images, int) else ""
    return f"{stage['method']}: {details['steps']:,} steps{on}, training loss {first:.4g} -> {last:.4g}"
