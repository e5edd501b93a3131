"""Are the items there that a search of experts is judged on, and can they be read? Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .calibration.answers import Splits, own_answers, own_files, refuse_seen, splits_of
from .calibration.inputs import condition_files
from .calibration.questions import questions_of
from .errors import SourceError
from .recipes.answer_files import answer_files, searches_of

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe


def check_answers(loaded: LoadedRecipe, checkpoint: Checkpoint, *, planned: bool = False) -> None:
    """Read the items of every search and of the evaluation, before a weight is read.

    Args:
        loaded: the recipe.
        checkpoint: of the model, which may bring items of its own.
        planned: nothing is run, so items that are not there are not missed.

    Raises:
        SourceError: a file is missing, empty or malformed, with the line; or holds too few items; or two
            files have one name; or something is to be reported on that a search chooses by.
    """
    recipe, folder = loaded.recipe, checkpoint.folder
    _check_names(recipe)
    if planned and not all(path.is_file() for path in _files(recipe, folder)):
        return
    splits = _splits(recipe, folder)
    seen = {
        f"stages[{index}].eep.splits.{name}": items
        for index, found in splits.items()
        for name, items in (("train", found.train), ("dev", found.dev))
    }
    for index, found in splits.items():
        refuse_seen(f"stages[{index}].eep.splits.test", found.test, seen)
    questions = questions_of(recipe, folder)
    if questions is not None:
        refuse_seen("evaluate.answers", questions.items, seen)


def answer_keys(recipe: Recipe, folder: Path) -> dict[int, str]:
    """Return index of a stage -> content hash of the items that it is judged on.

    Args:
        recipe: of the run.
        folder: of the model, which may bring items of its own.

    Raises:
        SourceError: as `check_answers`.
    """
    return {index: found.key for index, found in _splits(recipe, folder).items()}


def _splits(recipe: Recipe, folder: Path) -> dict[int, Splits]:
    searches = searches_of(recipe)
    return {index: splits_of(settings, folder, recipe.seed) for index, settings in searches.items()}


def _files(recipe: Recipe, folder: Path) -> list[Path]:
    """Return every file that items are read from."""
    files, searches = [*answer_files(recipe).values()], searches_of(recipe)
    for settings in searches.values():
        files += own_files(settings, folder)
    asked = recipe.evaluate.answers
    if asked is not None and asked.data is None and not searches:
        files.append(own_answers(folder)[1])
    return files


def _check_names(recipe: Recipe) -> None:
    """Refuse two files of one name: a result keeps a copy of each, side by side."""
    seen: dict[str, Path] = {}
    for path in [*condition_files(recipe.calibration), *answer_files(recipe).values()]:
        other = seen.setdefault(path.name, path)
        if other.resolve() != path.resolve():
            raise SourceError(
                f"{other} and {path}: a result keeps a copy of both, and they have one name",
                hint="rename one of them",
            )
