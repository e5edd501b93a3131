"""The files with questions and answers that a recipe names. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .experts import EepSettings
from .stage_base import StageSettings
from .tree import Location

if TYPE_CHECKING:
    from .schema import Recipe

_STAGES = "stages"
_OF_SEARCH = (("fitness", "data"), ("splits", "train"), ("splits", "dev"), ("splits", "test"))
_OF_EVALUATION = ("evaluate", "answers", "data")


def searches_of(recipe: Recipe) -> dict[int, EepSettings]:
    """Return index of a stage -> its settings, of the stages that search experts."""
    return {
        index: stage.settings
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage.settings, EepSettings) and stage.settings.searches
    }


def answer_files(recipe: Recipe) -> dict[Location, Path]:
    """Return where the recipe names a file -> the file: stages first, then what is evaluated."""
    places: list[Location] = [
        (_STAGES, index, *keys)
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage.settings, EepSettings)
        for keys in _OF_SEARCH
    ]
    found = {place: _value(recipe, place) for place in [*places, _OF_EVALUATION]}
    return {place: path for place, path in found.items() if isinstance(path, Path)}


def with_answer_files(recipe: Recipe, moved: Mapping[Location, Path]) -> Recipe:
    """Return the recipe with other files in some of these places."""
    for place, path in moved.items():
        recipe = _changed(recipe, place, path)
    return recipe


def answer_copies(recipe: Recipe, folder: Path) -> dict[Location, Path]:
    """Return the same places -> the copies of the files in an exported folder."""
    return {place: folder / path.name for place, path in answer_files(recipe).items()}


def with_plain_names(settings: StageSettings) -> StageSettings:
    """Return a stage's settings with the mere names of such files: the same wherever copies of them lie."""
    changed = settings
    for part, key in _OF_SEARCH if isinstance(settings, EepSettings) else ():
        path = getattr(getattr(changed, part), key)
        if isinstance(path, Path):
            changed = _changed(changed, (part, key), Path(path.name))
    return changed


def _value(recipe: Recipe, place: Location) -> Any:
    value: Any = recipe
    for step in place:
        value = value[step].settings if isinstance(step, int) else getattr(value, step, None)
    return value


def _changed(value: Any, place: Location, path: Path) -> Any:
    if not place:
        return path
    name, rest = str(place[0]), place[1:]
    if name != _STAGES:
        return value.model_copy(update={name: _changed(getattr(value, name), rest, path)})
    stages = list(value.stages)
    stage = stages[int(rest[0])]
    stages[int(rest[0])] = replace(stage, settings=_changed(stage.settings, rest[1:], path))
    return value.model_copy(update={name: tuple(stages)})
