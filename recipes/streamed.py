"""Which recipes go from disk to disk, a tensor at a time, so that no memory has to hold the model."""

from __future__ import annotations

from .experts import EepSettings
from .gates import Gate
from .schema import EvaluateSettings, Recipe

OUTPUTS = "max_abs_error"
"""A metric of outputs that is measured whatever `evaluate` says."""
_ALONE = "layers"  # of evaluate: asks for nothing by itself


def given_experts(recipe: Recipe) -> EepSettings | None:
    """Return the settings of the only stage, where it keeps experts that the recipe names; else None."""
    if len(recipe.stages) != 1:
        return None
    settings = recipe.stages[0].settings
    return settings if isinstance(settings, EepSettings) and not settings.searches else None


def needs_memory(recipe: Recipe) -> str | None:
    """Return the first key of a recipe for which the whole model has to be opened; None where none is.

    Args:
        recipe: one whose only stage keeps experts that are named.
    """
    found = _measured(recipe.evaluate) or _required(recipe.require)
    if found is not None:
        return found
    for export in recipe.export:
        if export.format != "compress":
            return f"export.format: {export.format}"
        if export.padded:
            return "export.padded"
    return None


def is_streamed(recipe: Recipe) -> bool:
    """Tell whether a recipe is carried out from disk to disk."""
    return given_experts(recipe) is not None and needs_memory(recipe) is None


def _measured(evaluate: EvaluateSettings) -> str | None:
    for name in EvaluateSettings.model_fields:
        if name != _ALONE and getattr(evaluate, name) is not None:
            return f"evaluate.{name}"
    return None


def _required(require: dict[str, Gate]) -> str | None:
    return f"require.{OUTPUTS}" if OUTPUTS in require else None
