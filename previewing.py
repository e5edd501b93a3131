"""What a stage would decide on the data: scores are computed, and nothing is changed or kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from .calibration.recording import record
from .compressors import registry
from .compressors.base import Previewing, Workspace
from .errors import UsageError
from .execution import check_memory, plan_document, plan_stages, resolve_device
from .models.open import open_model, read_spec
from .progress import Progress, step
from .recipes.loader import LoadedRecipe


def preview_document(loaded: LoadedRecipe, progress: Progress) -> dict[str, Any]:
    """Return the plan document of a recipe, its first stage with the details of what it would remove.

    What it would leave replaces what the plan assumes. Stages after it are planned as without data.

    Raises:
        UsageError: the first stage decides nothing by scores.
        PlanError, SourceError, StageError: as a run would.
    """
    recipe = loaded.recipe
    method = registry.get(recipe.stages[0].method) if recipe.stages else None
    if not isinstance(method, Previewing):
        first = recipe.stages[0].method if recipe.stages else "no stage"
        raise UsageError(
            f"--with-scores: the recipe begins with {first}, which removes nothing by scores",
            hint="leave --with-scores out; it is for recipes that begin with a pruning stage",
        )
    document = plan_document(loaded, progress)
    check_memory(plan_stages(read_spec(recipe.model), loaded)[:1], workers=1)
    model = open_model(recipe.model, device=resolve_device(recipe.device), progress=progress)
    settings = recipe.stages[0].settings
    with tempfile.TemporaryDirectory(prefix="compress-plan-") as name:
        folder = Path(name)
        calibration = record(
            model, recipe.calibration, seed=recipe.seed, cache=folder / "calibration", progress=progress
        )
        workspace = Workspace(_made(folder / "stage"), _made(folder / "measured"))
        with step(progress, f"{recipe.stages[0].method}, without cutting"):
            details = method.preview(model, settings, calibration, workspace, progress)
    document["stages"][0]["details"] = details
    _put_in(document["stages"], details)
    return document


def _put_in(stages: list[dict[str, Any]], details: dict[str, Any]) -> None:
    """Let the sizes be those of the decision, where later stages leave them as the first does."""
    for name in ("macs", "parameters", "bytes"):
        assumed, found = stages[0]["after"][name], details[name][1]
        for size in (stage[side] for stage in stages for side in ("before", "after")):
            if size[name] == assumed:
                size[name] = found


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
