"""Are the items there that a search of experts is judged on, and can they be read? Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .calibration.answers import splits_of
from .calibration.questions import questions_of
from .recipes.experts import EepSettings

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe


def check_answers(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Read the items of every search and of the evaluation, before a weight is read.

    Raises:
        SourceError: a file is missing, empty or malformed, with the line; or holds too few items.
    """
    answer_keys(loaded.recipe, checkpoint.folder)
    questions_of(loaded.recipe, checkpoint.folder)


def answer_keys(recipe: Recipe, folder: Path) -> dict[int, str]:
    """Return index of a stage -> content hash of the items that it is judged on.

    Args:
        recipe: of the run.
        folder: of the model, which may bring items of its own.

    Raises:
        SourceError: as `check_answers`.
    """
    searches = {
        index: stage.settings
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage.settings, EepSettings) and stage.settings.experts is None
    }
    return {index: splits_of(settings, folder, recipe.seed).key for index, settings in searches.items()}
