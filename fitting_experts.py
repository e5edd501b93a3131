"""Can a model be left with the experts that a recipe asks for? Known from its config alone. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import PlanError
from .models.expert_choice import check_counts, checked_experts, mixture_shape
from .recipes.experts import EepSettings
from .recipes.placing import placed

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe


def check_experts(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Hold the experts that the first stage keeps against the model, before its weights are fetched or read.

    What later stages find is what earlier ones leave, and is planned with them.

    Raises:
        PlanError: layers, experts or counts do not fit; with the stage's place in the file.
    """
    if not loaded.recipe.stages:
        return
    settings, config = loaded.recipe.stages[0].settings, checkpoint.config
    if not isinstance(settings, EepSettings):
        return
    try:
        if settings.experts is not None:
            checked_experts(config, settings.experts, settings.active_experts)
            return
        kept = settings.kept(mixture_shape(config).routing.experts)
        check_counts(config, kept, settings.active_experts)
    except PlanError as error:
        raise placed(error, loaded, 0) from None
