"""The questions that a run measures original and result on: which they are. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError
from ..recipes.answer_files import searches_of
from ..recipes.answers import AnswersSettings
from ..recipes.experts import FitnessSettings
from ..runtime.hashes import digest
from .answers import Item, in_order, own_answers, read_items, splits_of

if TYPE_CHECKING:
    from ..recipes.schema import Recipe


@dataclass(frozen=True)
class Questions:
    """Items with the way in which answers are judged.

    Attributes:
        items: at least one.
        settings: how they are judged, without a tie break.
    """

    items: tuple[Item, ...]
    settings: FitnessSettings

    @property
    def key(self) -> str:
        """Content hash of the items and of how they are judged."""
        settings = self.settings.model_dump(mode="json", exclude={"data", "batch_size"})
        return digest([[item.sha256 for item in self.items], settings])


def questions_of(recipe: Recipe, folder: Path) -> Questions | None:
    """Return what `evaluate.answers` asks for; None where it asks for nothing.

    Args:
        recipe: of a run.
        folder: of the model, which may bring items of its own.

    Raises:
        SourceError: a file is missing, empty or malformed, or holds too few items.
    """
    asked = recipe.evaluate.answers
    if asked is None:
        return None
    search = next(iter(searches_of(recipe).values()), None)
    fitness = None if search is None else search.fitness
    settings = _judged(asked, fitness)
    if asked.data is None and search is not None:
        _check_same(settings, search.fitness)
        items = splits_of(search, folder, recipe.seed).test
    else:
        path = own_answers(folder)[1] if asked.data is None else asked.data
        if asked.data is None and not path.is_file():
            raise SourceError(
                f"{folder}: the model comes with no items of its own ({path.relative_to(folder)})",
                hint="name a JSONL under evaluate.answers.data, with `prompt` and `answer`",
            )
        items = tuple(read_items(path, settings.by, settings.task))
    return Questions(_drawn(items, asked.samples, recipe.seed), settings)


def _judged(asked: AnswersSettings, fitness: FitnessSettings | None) -> FitnessSettings:
    """Return how answers are judged: as asked, and where nothing is asked as the search does."""
    usual = FitnessSettings.model_validate({}) if fitness is None or fitness.by == "loss" else fitness
    by = asked.by or usual.by
    values = {
        "by": by,
        "task": asked.task or (None if fitness is None else fitness.task),
        "batch_size": asked.batch_size or usual.batch_size,
        "tie_break": 0.0,
    }
    if by == "exact_match":
        values["new_tokens"] = asked.new_tokens or usual.new_tokens
    return FitnessSettings.model_validate(values)


def _check_same(settings: FitnessSettings, fitness: FitnessSettings) -> None:
    """Refuse to judge the items of a search by what they were not read for."""
    if fitness.by == "loss":
        raise SourceError(
            "evaluate.answers: the items of the search are judged by their loss, and have no right answers",
            hint="name a file under evaluate.answers.data, or leave answers out",
        )
    if (settings.by, settings.task) != (fitness.by, fitness.task):
        raise SourceError(
            f"evaluate.answers: by: {settings.by}, task: {settings.task}; the items of the search are of by:"
            f" {fitness.by}, task: {fitness.task}",
            hint="name a file under evaluate.answers.data, or leave by and task out",
        )


def _drawn(items: tuple[Item, ...], count: int | None, seed: int) -> tuple[Item, ...]:
    if count is None:
        return items
    found = in_order(items, seed)
    if count > len(found):
        raise SourceError(
            f"evaluate.answers.samples: {count} items, but there are {len(found)} different ones",
            hint="lower samples, or give more items",
        )
    return tuple(found[:count])
