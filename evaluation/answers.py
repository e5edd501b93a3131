"""How many questions original and result answer rightly."""

from __future__ import annotations

from typing import Any

from ..calibration.answer_scores import Scorer
from ..calibration.questions import Questions
from ..errors import StageError
from ..models.base import OpenModel
from ..progress import Progress, step
from .evaluator import Evaluation
from .reference import Reference


def ask(model: OpenModel, questions: Questions, progress: Progress) -> dict[str, Any]:
    """Return how a model does: accuracy, its standard error, and how many items there were.

    Raises:
        SourceError: an item does not fit the model.
        StageError: the model gives something else than numbers.
    """
    with step(progress, "questions with known answers"):
        score = Scorer(model, questions.items, questions.settings).score()
    if score.accuracy is None:
        raise StageError("the model's answers are not finite numbers, so none of them can be judged")
    return {"accuracy": score.accuracy, "standard_error": score.standard_error, "items": score.count}


def add_answers(
    model: OpenModel, questions: Questions, reference: Reference, result: Evaluation, progress: Progress
) -> None:
    """Ask the result what the original was asked, and add both to the evaluation."""
    before, after = reference.index["answers"], ask(model, questions, progress)
    result.metrics["answers_original"] = round(before["accuracy"], 6)
    result.metrics["answers"] = round(after["accuracy"], 6)
    result.metrics["answers_drop"] = round(before["accuracy"] - after["accuracy"], 6)
    settings = questions.settings
    result.details["answers"] = {
        "by": settings.by,
        "task": settings.task,
        "items": after["items"],
        "original_standard_error": _rounded(before["standard_error"]),
        "standard_error": _rounded(after["standard_error"]),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
