"""What stages that removed or merged experts tell in a report, in pieces for all who show it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]

ORIGINAL, RANDOM, RESULT = "original", "random", "eep"
"""Names of rows of `scores` that are no rule; the first is of the model that the stage began with."""
SKIPPING = "skipping"
"""Name of the row of dynamic skipping, which removes nothing."""
_NAMES = {
    "frequency": "those that most tokens meet (frequency)",
    "soft_activation": "those with most routing weight (soft activation)",
    "naee": "those with which the outputs change least (NAEE)",
    "eep: experts chosen": "chosen by the search, before merging",
    "eep: router free, not shipped": "the best with a free router, not shipped",
    RESULT: "result of the search",
}
_MEASURES = {
    "exact_match": "items whose generated text is the answer",
    "tokens": "tokens of the answers that are the model's first choice",
    "choices": "items of whose choices the right one is the most likely",
}
_COUNTS = ("experts_before", "experts_after", "active_before", "active_after")
_TWO = 2.0  # standard errors


def expert_stages(document: Document) -> list[Document]:
    """Return the stages that decided which experts stay, in order."""
    return [stage for stage in document.get("stages", ()) if _tells(stage.get("details") or {})]


def _tells(details: Document) -> bool:
    # A manifest is anybody's, and other methods may have details of these names.
    return bool(details.get("experts")) and all(isinstance(details.get(key), int) for key in _COUNTS)


def is_searched(details: Document) -> bool:
    """Tell whether a search decided, and not the recipe."""
    return bool(details.get("scores"))


def experts_of(details: Document) -> dict[int, tuple[int, ...]]:
    """Return layer -> experts that stay, by their numbers before the stage; layers in order."""
    return {int(layer): tuple(kept) for layer, kept in sorted(details["experts"].items(), key=_layer)}


def _layer(entry: tuple[str, Any]) -> int:
    return int(entry[0])


def removes(details: Document) -> bool:
    """Tell whether there are fewer experts afterwards."""
    return bool(details["experts_after"] < details["experts_before"])


def before_told(details: Document) -> str:
    """Name the model that a stage began with; that of a second stage has fewer experts than the original."""
    return f"before this stage, all {details['experts_before']} experts"


def counts_told(details: Document) -> str:
    """Say what became of the experts: "kept 4 of 8 experts in each of 32 layers, merged"."""
    before, after, layers = details["experts_before"], details["experts_after"], len(details["experts"])
    where = f"in each of {layers} layers" if layers > 1 else "in 1 layer"
    merged = bool(details.get("merged"))
    if after < before:
        told = f"kept {after} of {before} experts {where}{', merged' if merged else ''}"
    else:
        told = f"{'merged' if merged else 'kept'} all {before} experts {where}"
    first, last = details["active_before"], details["active_after"]
    return told if first == last else f"{told}; {last} instead of {first} for a token"


def layers_told(details: Document) -> list[tuple[str, str]]:
    """Return (layers, experts that stay) as people write them; neighbours with the same experts together."""
    found: list[tuple[list[int], tuple[int, ...]]] = []
    for layer, kept in experts_of(details).items():
        if found and found[-1][1] == kept:
            found[-1][0].append(layer)
        else:
            found.append(([layer], kept))
    return [(spans(layers), spans(kept)) for layers, kept in found]


def spans(numbers: Sequence[int]) -> str:
    """Return rising numbers as people write them, three or more neighbours as a span: "0, 2-5, 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else list(map(str, run)) for run in runs]
    return ", ".join(text for part in parts for text in part)


def measure_told(fitness: Document) -> str:
    """Say what an accuracy is a share of."""
    return _MEASURES.get(fitness["by"], str(fitness["by"]))


@dataclass(frozen=True)
class Contender:
    """A row of the comparison on the test items.

    Attributes:
        key: its name in the report.
        name: as people read it.
        train: fitness on the train items, in points; None where it was not measured.
        accuracy: 0 to 1; None where the model is judged by its loss.
        points: the same with ties broken by the loss, 0 to 100, or minus a loss times 100; None: it failed.
        error: standard error of the accuracy over the items, 0 to 1; None where it is not known.
        draws: how many random choices are behind the row; 0: it is one choice.
        deviation: standard deviation of the draws, of the accuracy (0 to 1), or else of the points.
    """

    key: str
    name: str
    train: float | None
    accuracy: float | None
    points: float | None
    error: float | None
    draws: int
    deviation: float | None

    @property
    def shown(self) -> str:
        """The accuracy, or the points where there is none."""
        if self.accuracy is not None:
            return f"{self.accuracy:.1%}"
        return "no finite outputs" if self.points is None else f"{self.points:.4g}"

    @property
    def trained(self) -> str:
        """The fitness on the train items; empty where it was not measured."""
        return "" if self.train is None else f"{self.train:.4g}"

    @property
    def spread(self) -> str:
        """How sure the figure is, in points: its standard error, or else what it says that this is."""
        value = self.deviation if self.draws else self.error
        if value is None:
            return ""
        told = f"{100 * value:.1f}" if self.accuracy is not None else f"{value:.2g}"
        return f"{told}, deviation of the choices" if self.draws else told


def contenders(details: Document) -> list[Contender]:
    """Return the rows of the comparison, in its order; dynamic skipping stands below the first one.

    Args:
        details: of a stage that searched.
    """
    rows = [_contender(row, _name(row, details)) for row in details["scores"]]
    found = details.get(SKIPPING)
    if found:
        name = f"before this stage, skipping experts: {found['experts_per_token']:.2f} a token"
        rows.insert(1, _contender({**found, "name": SKIPPING}, name))
    return rows


def _name(row: Document, details: Document) -> str:
    if row["name"] == ORIGINAL:
        return before_told(details)
    if not row.get("draws"):
        return _NAMES.get(row["name"], str(row["name"]))
    failed = f" ({row['failed']} more gave no finite outputs)" if row.get("failed") else ""
    return f"random ones, mean of {row['draws'] - row.get('failed', 0)}{failed}"


def _contender(row: Document, name: str) -> Contender:
    accuracy = row.get("accuracy")
    return Contender(
        key=row["name"],
        name=name,
        train=row.get("train"),
        accuracy=accuracy,
        points=row["score"],
        error=row.get("standard_error"),
        draws=row.get("draws", 0),
        deviation=row.get("score_deviation" if accuracy is None else "deviation"),
    )


def result_of(rows: Sequence[Contender]) -> Contender:
    """Return the row of what was shipped."""
    return next(row for row in rows if row.key == RESULT)


def not_told_apart(rows: Sequence[Contender], items: int) -> list[Contender]:
    """Return the rows whose accuracy is less than two standard errors of the difference from the result's.

    The errors are added up as those of different items are, which is careful, since all rows answer the same
    ones. Where all items came out alike, the error counts as that of one item.

    Args:
        rows: of `contenders`.
        items: of the test.
    """
    found, last = [], result_of(rows)
    for row in rows:
        if row is last or None in (row.accuracy, row.error, last.accuracy, last.error):
            continue
        assert row.accuracy is not None and row.error is not None
        assert last.accuracy is not None and last.error is not None
        errors = math.hypot(row.error or 1 / items, last.error or 1 / items)
        if abs(row.accuracy - last.accuracy) < _TWO * errors:
            found.append(row)
    return found


def above_random(rows: Sequence[Contender]) -> float | None:
    """Return by how many of their standard deviations the result is above the mean of random choices.

    None where there were none, or too few of them for a deviation, or all were alike.
    """
    last = result_of(rows)
    for row in rows:
        if not row.draws or not row.deviation:
            continue
        pair = (last.accuracy, row.accuracy) if row.accuracy is not None else (last.points, row.points)
        if pair[0] is not None and pair[1] is not None:
            return (pair[0] - pair[1]) / row.deviation
    return None


def search_told(details: Document) -> str:
    """Say how the experts were searched for, as a sentence without an end.

    Args:
        details: of a stage that searched; with or without what stands in the report alone.
    """
    fitness, search = details["fitness"], details.get("search")
    told = f"searched with seed {details['seed']}"
    if search:
        total, first = search["evaluations"], search["prune_evals"]
        parts = [f"{first:,} choose experts"] * bool(first) + [f"{total - first:,} merge"] * (total > first)
        told = f"{search['evaluations']:,} evaluations with seed {details['seed']} ({', '.join(parts)})"
    of_task = f" of the task {fitness['task']}" if fitness.get("task") else ""
    told += f", fitness {fitness['by']} on {fitness['train']:,} train items{of_task}"
    return told + (f", the best scored again on {fitness['dev']:,} others" if fitness["dev"] else "")
