"""What stages that removed or merged experts say of it, and how questions were answered: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..exporters.experts_table import (
    above_random,
    contenders,
    counts_told,
    expert_stages,
    is_searched,
    layers_told,
    measure_told,
    removes,
    search_told,
)
from ._tables import Section, Table

Document = Mapping[str, Any]

_MOST_ROWS = 16


def sections(document: Document) -> Iterator[Section]:
    """Yield what every stage that changed experts came to.

    Args:
        document: a report; nothing is yielded where no stage did so.
    """
    for stage in expert_stages(document):
        yield from _stage(stage)


def _stage(stage: Document) -> Iterator[Section]:
    details, method = stage["details"], stage["method"]
    yield short(stage)
    rows = layers_told(details)
    if removes(details) and len(rows) <= _MOST_ROWS:
        yield Table(f"{method}: experts that stay", ["layers", "experts"], [list(row) for row in rows])
    if is_searched(details):
        yield f"{method}: {search_told(details)}"
        yield _answers(method, details)
        distance = above_random(contenders(details))
        if distance is not None:
            side = "above" if distance >= 0 else "below"
            yield (
                f"{method}: the result is {abs(distance):.1f} deviations of the random choices {side} their"
                " mean"
            )


def _answers(method: str, details: Document) -> Table:
    fitness = details["fitness"]
    columns = ["experts", "test", "standard error, points", "points on train"]
    rows = [[row.name, row.shown, row.spread, row.trained] for row in contenders(details)]
    return Table(f"{method}: {fitness['by']} on {fitness['test']:,} test items", columns, rows)


def short(stage: Document) -> str:
    """Return all in one line, for a history."""
    return f"{stage['method']}: {counts_told(stage['details'])}"


def of_original(experts: Mapping[str, int]) -> str:
    """Say how many experts a layer of a checkpoint has: "4 of 8 in a layer, 2 for a token".

    Args:
        experts: as `inspect` tells it.
    """
    of, active = experts["of"], experts["active_of"]
    total = (
        f"{experts['kept']} in a layer" if experts["kept"] == of else f"{experts['kept']} of {of} in a layer"
    )
    per_token = f"{experts['active']} for a token"
    return f"{total}, {per_token}" + ("" if experts["active"] == active else f" instead of {active}")


def answered(evaluation: Document) -> Iterator[str]:
    """Yield how the questions of the evaluation were answered; nothing where none were asked."""
    found = evaluation.get("answers")
    if not found:
        return
    metrics = evaluation["metrics"]
    before = _share(metrics["answers_original"], found["original_standard_error"])
    after = _share(metrics["answers"], found["standard_error"])
    what = f"{measure_told(found)}, of {found['items']:,} items"
    yield f"answers: {after}, of the original {before}: {what}"


def _share(value: float, error: float | None) -> str:
    return f"{value:.1%}" + ("" if error is None else f" (standard error {100 * error:.1f})")
