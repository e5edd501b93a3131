"""Scores on the test items: the original, what rules would have kept, and what the search came to.

Nothing is chosen by these scores. All of them are of models as they would be shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from ....calibration.answer_scores import Score, Scorer
from ....progress import Progress, step
from .genome import Individual
from .judging import Judge

ORIGINAL = "original"
RANDOM = "random"
PRUNED = "eep: experts chosen"
FREE = "eep: router free, not shipped"
FINAL = "eep"


@dataclass(frozen=True)
class Contender:
    """One that is scored.

    Attributes:
        name: in the table.
        individual: what it leaves of the model; None: the model as it is.
        train: its fitness on the train items, where that was measured.
    """

    name: str
    individual: Individual | None
    train: float | None = None


def compared(
    judge: Judge, scorer: Scorer, contenders: Sequence[Contender], progress: Progress
) -> list[dict[str, Any]]:
    """Return a JSON row of each contender: `name`, `train` and its `score` on the test items, in points.

    Args:
        judge: of the test items.
        scorer: the same items, of the model as it is.
        contenders: in the order of the table; those of one individual are scored once.
        progress: gets one step.
    """
    known: dict[str, Score] = {}
    rows = []
    with step(progress, "scores on the test items", len(contenders)):
        for contender in contenders:
            individual = contender.individual
            key = "" if individual is None else individual.sha256
            if key not in known:
                known[key] = scorer.score() if individual is None else judge.score(individual)
            progress.advance(detail=contender.name)
            rows.append({"name": contender.name, **trained(contender.train), **scored(known[key])})
    return rows


def scored(score: Score) -> dict[str, Any]:
    """Return the JSON form of a score on the test items, with its points under `score`."""
    found = score.to_json()
    return {"score": found.pop("points"), **found}


def trained(fitness: float | None) -> dict[str, float]:
    """Return the entry of a fitness on the train items, where there is one that is a number."""
    return {"train": round(fitness, 4)} if fitness is not None and math.isfinite(fitness) else {}


def spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row for many random choices: the mean of each figure, and how far the choices are apart.

    Args:
        rows: of `compared`, one a choice. Those of models that failed are counted and left out.
    """
    finite = [row for row in rows if row["score"] is not None]
    scores = [float(row["score"]) for row in finite]
    found: dict[str, Any] = {
        "name": RANDOM,
        "draws": len(rows),
        "failed": len(rows) - len(finite),
        "score": round(fmean(scores), 4) if scores else None,
        "score_deviation": _deviation(scores, 4),
        "count": rows[0]["count"],
    }
    train = [float(row["train"]) for row in finite if "train" in row]
    found |= trained(fmean(train) if train else None)
    accuracies = [float(row["accuracy"]) for row in finite if row["accuracy"] is not None]
    if accuracies:
        found["accuracy"] = round(fmean(accuracies), 6)
        found["deviation"] = _deviation(accuracies, 6)
    return found


def _deviation(values: Sequence[float], digits: int) -> float | None:
    """Return the standard deviation; None of a single value."""
    return round(stdev(values), digits) if len(values) > 1 else None
