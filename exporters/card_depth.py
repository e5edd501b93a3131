"""The card's account of depth pruning: which blocks stay, what decided it, where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..models.origins import NAME as DEPTH_FILE
from ..recipes.depth import SETTLED
from .card_subject import Subject
from .depth_table import (
    LEARNS_BESIDE,
    RULES,
    Document,
    blocks_of,
    earlier,
    groups_told,
    is_learned,
    left_of_original,
    places_told,
    several_lists,
)
from .markdown import code, table
from .pruning_table import change


def removed_blocks(stages: Sequence[Document], subject: Subject) -> Iterator[str]:
    """Yield what is told of stages that removed blocks, here or in earlier runs, or nothing without any.

    Args:
        stages: of `depth_table.removals`.
        subject: of the card.
    """
    for number, stage in enumerate(stages):
        before = "the original" if number == 0 else "the model before this stage"
        yield from _stage(stage, before)
    if stages:
        yield from _origin(subject)
    told = earlier(subject.document)
    if told:
        yield from _earlier(subject, told["removals"])
    if len(stages) > 1 or told:
        yield from _left(subject, len(stages))


def _stage(stage: Document, before: str) -> Iterator[str]:
    details = stage["details"]
    if is_learned(details):
        yield f"By {code(stage['method'])}: which blocks stay was learned (TinyFusion, arXiv 2412.01199)."
        yield from _search(details)
    else:
        rule = RULES.get(details["by"], details["by"])
        yield f"By {code(stage['method'])}, rule {code(details['by'])}: {rule}."
        yield from _drawn(details.get("random"))
    yield f"Blocks are counted from 0, as in {before}."
    yield ""
    rows = [(code(row.name), row.of, len(row.kept), places_told(row.kept)) for row in blocks_of(details)]
    yield from table(("blocks", "before", "after", "those that stay"), rows)
    if is_learned(details):
        yield from _groups(details)
    sizes = [
        (name, f"{stage['before'][key]:,}", f"{stage['after'][key]:,}", _share(stage, key))
        for key, name in (("parameters", "parameters"), ("macs", "multiply-accumulates of one forward"))
        if key in stage.get("before", {}) and key in stage.get("after", {})
    ]
    if sizes:
        yield from table(("", "before", "after", "kept"), sizes)


def _share(stage: Document, key: str) -> str:
    return f"{stage['after'][key] / stage['before'][key]:.1%}"


def _search(details: Document) -> Iterator[str]:
    found = details["search"]
    first, last = change(found["loss"])
    yield f"The search took {found['steps']:,} steps on {details['data']:,} latents, every sample through a"
    yield f"choice of its own; {LEARNS_BESIDE.get(details['mode'], details['mode'])}."
    yield f"Its loss was {first:.4g} on average over its first twelfth, {last:.4g} over its last."


def _drawn(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found:
        yield f"Of {found['drawn']:,} choices, with losses from {found['least']:.4g} to"
        yield f"{found['largest']:.4g}, the one with {found['loss']:.4g} was taken."


def _groups(details: Document) -> Iterator[str]:
    """Yield a table of groups with the probability of what was chosen."""
    found = groups_told(details)
    several = several_lists(details)
    rows = [
        (f"{code(row['blocks'])} {places_told(row['of'])}" if several else places_told(row["of"]),
         places_told(row["kept"]), f"{row['confidence']:.3f}")
        for row in found
    ]  # fmt: skip
    yield "Of every group these stay; the probability is what the search gave this choice in the end:"
    yield ""
    yield from table(("group of blocks", "those that stay", "probability"), rows)
    open_ones = sum(row["confidence"] < SETTLED for row in found)
    if open_ones:
        yield f"**{open_ones} of {len(found)} choices are not settled**: they have less than {SETTLED:.0%}."
        yield ""


def _origin(subject: Subject) -> Iterator[str]:
    model, revision = subject.model, subject.source_revision
    at = f", revision {code(revision)}" if revision else ""
    yield f"The blocks come from {code(subject.source)}{at}; {code(DEPTH_FILE)} beside the weights says which"
    yield f"ones they were. The config gives the new depth: {code(model['class'])} builds just the blocks"
    yield from ("that the weights are for.", "")


def _earlier(subject: Subject, removed: Sequence[Document]) -> Iterator[str]:
    """Tell of removals in runs before, of which the source says something in a file of its own."""
    told = []
    for one in removed:
        method, parent = (str(one.get(key, "")) for key in ("method", "parent"))
        path = PurePath(parent)
        told.append(f"{code(method)} on {code(path.name if path.is_absolute() else parent)}")
    yield f"{code(subject.source)} had lost blocks already, in earlier runs: {', then '.join(told)}."
    yield ""


def _left(subject: Subject, number: int) -> Iterator[str]:
    total = number + len(earlier(subject.document).get("removals", ()))
    what = f"all {total} removals" if total > 1 else "that"
    first = ", which is the model that the first of them began with" if total > number else ""
    yield f"After {what} these are left, counted as in the original{first}:"
    yield ""
    rows = [
        (code(row.name), row.of, len(row.kept), places_told(row.kept))
        for row in left_of_original(subject.document)
    ]
    yield from table(("blocks", "original", "left", "places"), rows)
