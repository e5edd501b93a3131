"""The card's account of expert pruning: which experts stay, how they were found, and what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .card_subject import Subject
from .experts_table import (
    ORIGINAL,
    RESULT,
    SKIPPING,
    Contender,
    Document,
    above_random,
    contenders,
    counts_told,
    expert_stages,
    is_searched,
    layers_told,
    measure_told,
    not_told_apart,
    removes,
    result_of,
    search_told,
)
from .markdown import code, sentence, table

_BEFORE = "the model before this stage"
_MOST_NUMBERS = 600  # characters of all lists of experts; longer ones are in the report
_SIZES = (
    ("parameters", "parameters"),
    ("active_parameters", "parameters that a token meets"),
    ("bytes", "bytes of all tensors"),
)


def experts(subject: Subject) -> Iterator[str]:
    """Yield the section on the experts of a mixture, or nothing where no stage changed them."""
    found = expert_stages(subject.document)
    if not found:
        return
    yield from ("## Which experts stay", "")
    for number, stage in enumerate(found):
        yield from _stage(stage, "the original" if number == 0 else _BEFORE)


def _stage(stage: Document, before: str) -> Iterator[str]:
    details = stage["details"]
    yield f"By {code(stage['method'])}: {counts_told(details)}."
    if is_searched(details):
        yield "They were found by evolution on the answers of the model, without gradients or training"
        yield "(EEP, arXiv 2407.00945)."
    else:
        yield "The recipe says which; nothing was searched or scored here."
    yield ""
    yield from table(("", "before", "after", "kept"), _sizes(stage))
    yield from _kept(details, before)
    if is_searched(details):
        yield f"The search: {search_told(details)}."
        yield ""
        yield from _answers(details)


def _sizes(stage: Document) -> Iterator[tuple[str, str, str, str]]:
    details = stage["details"]
    pairs = [
        (name, details[f"{key}_before"], details[f"{key}_after"])
        for key, name in (("experts", "experts of a layer"), ("active", "of these, a token meets"))
    ]
    pairs += [
        (name, stage["before"][key], stage["after"][key])
        for key, name in _SIZES
        if key in stage.get("before", {}) and key in stage.get("after", {})
    ]
    for name, first, last in pairs:
        yield name, f"{first:,}", f"{last:,}", f"{last / first:.1%}"


def _kept(details: Document, before: str) -> Iterator[str]:
    rows = layers_told(details)
    if removes(details):
        if sum(len(kept) for _, kept in rows) > _MOST_NUMBERS:
            yield f"{code('report.json')} lists the experts that stay, numbered from 0 as in {before}."
            yield ""
        else:
            yield f"Experts that stay, numbered from 0 as in {before}:"
            yield ""
            yield from table(("layers", "experts"), rows)
    if details.get("router") == "free":
        yield "The router weighs all experts that there were; a matrix maps these weights to the experts"
        yield "that stay, which are named above by what weighs most in them."
        yield ""
    if details.get("merged"):
        groups = details["groups"]
        several = len(groups) < len(details["experts"])
        yield "The experts that stay are weighted sums of those that their layer had before, or one of"
        yield "these unchanged; the weights"
        yield (
            f"are shared by the layers of each of {len(groups)} groups."
            if several
            else ("are each layer's own.")
        )
        yield ""


def _answers(details: Document) -> Iterator[str]:
    """Yield what was measured on the test items, and how far it can be trusted."""
    rows, fitness = contenders(details), details["fitness"]
    items, of_loss = fitness["test"], result_of(rows).accuracy is None
    what = (
        "points: minus 100 times the mean loss of a token, in nats"
        if of_loss
        else f"share of {measure_told(fitness)}"
    )
    yield f"On {items:,} test items, on which nothing was chosen; {what}."
    yield "All rows answer the same items; where a row says nothing else, as the model would be shipped:"
    yield ""
    header = ("experts", "test", "standard error, points", f"points on the {fitness['train']:,} train items")
    yield from table(header, (_row(row) for row in rows))
    if any(row.key == SKIPPING for row in rows):
        yield "Skipping removes nothing: a token leaves out its second expert where that weighs little beside"
        yield "the first, less than for half of all tokens of the train items."
    yield "Experts were chosen for items of this kind alone: what else the model could do may be lost."
    yield "The search picks the best of many by the train items, so these flatter its own rows."
    yield from _sureness(rows, items)
    yield ""


def _row(row: Contender) -> tuple[str, str, str, str]:
    cells = (row.name, row.shown, row.spread, row.trained)
    return cells if row.key != RESULT else (f"**{cells[0]}**", f"**{cells[1]}**", *cells[2:])


def _sureness(rows: Sequence[Contender], items: int) -> Iterator[str]:
    if result_of(rows).accuracy is not None:
        yield "A standard error tells how far a share would move if other items of this kind were drawn; a"
        yield "deviation, how far random choices are apart."
    else:
        yield "No standard error is known of a loss."
    if any(row.error == 0 for row in rows):
        yield f"One of 0 says no more than that all {items:,} items came out alike."
    distance = above_random(rows)
    if distance is not None:
        side = "above" if distance >= 0 else "below"
        yield f"The result is {abs(distance):.1f} such deviations {side} the mean of the random choices."
    equal = [row.name for row in not_told_apart(rows, items) if row.key != ORIGINAL]
    if equal:
        yield f"**These items do not tell it apart** from: {'; '.join(equal)}."
    if any(row.key == ORIGINAL for row in not_told_apart(rows, items)):
        yield (
            f"Nor do they tell it apart from {_BEFORE}."
            if equal
            else sentence(f"these items do not tell it apart from {_BEFORE}")
        )
