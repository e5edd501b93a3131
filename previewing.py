"""What a stage would decide on the data: scores are computed, and nothing is changed or kept."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from .calibration.recording import record
from .compressors import registry
from .compressors.base import Preview, Previewing, Workspace
from .errors import UsageError
from .execution import resolve_device
from .models.open import open_model, read_spec
from .planning import check_memory, document_of, plan_exports, plan_stages
from .progress import Progress, step
from .recipes.loader import LoadedRecipe


def preview_document(loaded: LoadedRecipe, progress: Progress) -> dict[str, Any]:
    """Return the plan document of a recipe, its first stage with the details of what it would remove.

    The stages after it and the exports are planned on what it would leave.

    Raises:
        UsageError: the first stage decides nothing by scores.
        PlanError, SourceError, StageError: as a run would.
    """
    recipe = loaded.recipe
    method = registry.get(recipe.stages[0].method) if recipe.stages else None
    if not isinstance(method, Previewing):
        first = recipe.stages[0].method if recipe.stages else "no stage"
        raise UsageError(
            f"--with-scores: the recipe begins with {first}, whose choice is not made before it runs",
            hint="leave --with-scores out; it is for recipes that begin with isomorphic",
        )
    spec = read_spec(recipe.model)
    with step(progress, "plan"):
        assumed = plan_stages(spec, loaded)
        plan_exports(loaded, spec, assumed)  # refuses what is out of reach before weights are read
        check_memory(assumed[:1], workers=1)
    seen = _preview(method, loaded, progress)
    first = replace(assumed[0], spec=seen.spec, after=seen.spec.size(), notes=seen.notes)
    plans = plan_stages(spec, loaded, [first])
    exports = plan_exports(loaded, spec, plans, decided=True)
    document = document_of(loaded, spec, plans, exports)
    document["stages"][0]["details"] = seen.details
    return document


def _preview(method: Previewing, loaded: LoadedRecipe, progress: Progress) -> Preview:
    """Let the first stage decide on the weights and the calibration samples."""
    recipe = loaded.recipe
    model = open_model(recipe.model, device=resolve_device(recipe.device), progress=progress)
    with tempfile.TemporaryDirectory(prefix="compress-plan-") as name:
        folder = Path(name)
        calibration = record(
            model, recipe.calibration, seed=recipe.seed, cache=folder / "calibration", progress=progress
        )
        workspace = Workspace(_made(folder / "stage"), _made(folder / "measured"))
        with step(progress, f"{recipe.stages[0].method}, without cutting"):
            return method.preview(model, recipe.stages[0].settings, calibration, workspace, progress)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
