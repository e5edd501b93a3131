"""The recipe of an exported folder stands in it twice: as text, and resolved in the report. Torch-free.

People read and run recipe.yaml; what is verified and made again is the report's. They must say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from ..calibration.inputs import FILE_KEYS
from ..errors import RecipeError, VerifyError
from ..recipes.answer_files import answer_copies, answer_files, with_answer_files
from ..recipes.data import PATH_KEYS
from ..recipes.loader import load_recipe
from ..recipes.schema import Recipe
from ..recipes.tree import read

RECIPE_NAME = "recipe.yaml"
_MAX_BYTES = 4 * 2**20


def recorded_recipe(document: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a report; nothing in it names variables of this machine's environment.

    Raises:
        RecipeError: it is none that this version knows.
    """
    recipe = document.get("recipe")
    if not isinstance(recipe, Mapping):
        raise RecipeError("the report holds no recipe")
    return load_recipe(recipe).recipe


def copies(recipe: Recipe, folder: Path) -> dict[str, Path]:
    """Return key of `calibration` -> the copy in an exported folder of the file that it names."""
    return {
        key: folder / Path(path).name
        for key in FILE_KEYS
        if (path := getattr(recipe.calibration, key)) is not None
    }


def with_copies(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe that samples on, and asks, the copies in an exported folder."""
    calibration = recipe.calibration.model_copy(update=copies(recipe, folder))
    moved = recipe.model_copy(update={"calibration": calibration})
    return with_answer_files(moved, answer_copies(recipe, folder))


def check_recipe(folder: Path, document: Mapping[str, Any]) -> str:
    """Hold the text of a folder's recipe against the resolved recipe of its report.

    Args:
        folder: may hold a recipe.yaml.
        document: its report.

    Returns:
        What was found, in a few words. A report whose recipe this version does not know, because
        another version or other methods made it, cannot be compared; that is said, too.

    Raises:
        VerifyError: they differ, or the text cannot be read although the report's recipe can.
    """
    path = folder / RECIPE_NAME
    if not path.is_file():
        return f"the folder has no {RECIPE_NAME}"
    try:
        recorded = _comparable(recorded_recipe(document))
    except RecipeError as error:
        return f"not compared: this version does not know the recipe of the report: {error.message}"
    try:
        stated = _comparable(_read(path))
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        raise VerifyError(f"{RECIPE_NAME} cannot be read: {error}") from None
    others = [key for key in recorded if stated[key] != recorded[key]]
    if others:
        raise VerifyError(f"{RECIPE_NAME} is not the recipe of the report: {', '.join(others)} differ")
    return f"{RECIPE_NAME} is the recipe of the report"


def _read(path: Path) -> Recipe:
    # A text that named variables was resolved when it was written, so what looks like one is none.
    if path.stat().st_size > _MAX_BYTES:
        raise RecipeError(f"{path.stat().st_size} bytes; at most {_MAX_BYTES} are read")
    return load_recipe(read(path.read_text(encoding="utf-8-sig"), RECIPE_NAME, expand=False).value).recipe


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values; of files that a folder has copies of the name: they were found beside it."""
    named = {key: Path(path.name) for key, path in answer_files(recipe).items()}
    values = with_answer_files(recipe, named).model_dump(mode="json")
    calibration = values["calibration"]
    places = [(calibration, key) for key in (*FILE_KEYS, "images")]
    places += [(calibration["data"], key) for key in PATH_KEYS if calibration["data"] is not None]
    for holder, key in places:
        if holder[key] is not None:
            holder[key] = PurePath(holder[key]).name
    return values
