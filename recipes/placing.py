"""Where in a recipe an error of a stage's plan belongs: methods know keys, not files or stages."""

from __future__ import annotations

import re

from ..errors import PlanError
from .allocation import AllocationSettings
from .loader import LoadedRecipe
from .tree import Location

_KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)*): ")


def placed(error: PlanError, loaded: LoadedRecipe, index: int) -> PlanError:
    """Return the error with its place in front: the file and line of the stage, or of the key it names.

    Args:
        error: of the stage's plan; a message that begins as `budget.ratio: ...` names a key of the stage.
        loaded: the recipe.
        index: of the stage.
    """
    stage = loaded.recipe.stages[index]
    location: Location = ("stages", index, stage.method)
    message = error.message
    found = _KEY.match(message)
    if found:
        parts = found[1].split(".")
        nested = getattr(stage.settings, "bits", None)
        if parts[0] in type(stage.settings).model_fields:
            location, message = (*location, *parts), message[found.end() :]
        elif isinstance(nested, AllocationSettings) and parts[0] in AllocationSettings.model_fields:
            location, message = (*location, "bits", *parts), message[found.end() :]
    return PlanError(str(loaded.error(location, message)), hint=error.hint)
