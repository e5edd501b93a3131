"""The public face of a run: `plan`, `preview`, `run`, `evaluate`. Refuses first, imports torch after.

A wrong recipe, an unusable output folder or a damaged checkpoint is answered before the heavy
half (`planning`, `execution`) is imported; see `preflight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import preflight
from .errors import SourceError, UsageError
from .models import checkpoint as checkpoints
from .progress import Progress, SilentProgress
from .recipes.export import PushSettings
from .recipes.loader import LoadedRecipe, load_recipe
from .recipes.streamed import is_streamed
from .recipes.workers import Workers, workers_for
from .workdir import WorkDirectory

RecipeSource = str | Path | Mapping[str, Any] | LoadedRecipe


def _as_loaded(recipe: RecipeSource) -> LoadedRecipe:
    return recipe if isinstance(recipe, LoadedRecipe) else load_recipe(recipe)


def plan(recipe: RecipeSource, *, progress: Progress | None = None) -> dict[str, Any]:
    """Predict a run from configs and headers alone; nothing is written.

    Args:
        recipe: path of a YAML file, a mapping, or a loaded recipe. Its model may be a folder that
            holds only configs.
        progress: told what is happening.

    Returns:
        The plan document: `recipe, model, stages[], export{format, path, bytes}`; `export` is a list
        where the recipe exports several variants.

    Raises:
        RecipeError, PlanError, SourceError: as `run` would.
    """
    loaded = _as_loaded(recipe)
    checkpoint = checkpoints.locate(loaded.recipe.model, weights=False)
    preflight.check_stages(loaded, checkpoint, planned=True)
    from .planning import plan_document

    return plan_document(loaded, progress or SilentProgress())


def preview(recipe: RecipeSource, *, progress: Progress | None = None) -> dict[str, Any]:
    """Predict a run, and compute what its first stage would remove; nothing is cut, and nothing is written.

    Weights are read and calibration is recorded, which takes as long as the first half of the stage.

    Args:
        recipe: as of `plan`, with a model that has its weights.
        progress: told what is happening.

    Returns:
        The plan document; `stages[0].details` is what the stage would report, with its `selection`.

    Raises:
        UsageError: the first stage removes nothing by scores.
        RecipeError, PlanError, SourceError, StageError: as `run` would.
    """
    loaded = _as_loaded(recipe)
    preflight.check_calibration(loaded)
    preflight.check_stages(loaded, checkpoints.locate(loaded.recipe.model, weights=False))
    checkpoints.preflight(loaded.recipe.model)
    from .previewing import preview_document

    return preview_document(loaded, progress or SilentProgress())


def run(
    recipe: RecipeSource,
    *,
    work_dir: str | Path = ".compress",
    fresh: bool = False,
    overwrite: bool | None = None,
    strict: bool = False,
    workers: str | Workers = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: path of a YAML file, a mapping, or a loaded recipe.
        work_dir: keeps finished stages; the next run resumes from it.
        fresh: redo every stage even where a finished one is kept.
        overwrite: replace output folders that compress wrote; None: as the recipe says.
        strict: turn warnings into failures before anything ships.
        workers: processes that a stage may use, or `ray` for a Ray cluster, see `read_workers`; of no
            effect on the result.
        progress: told what is happening.

    Returns:
        The report, also written to `report.json` in the output folder. Where the recipe exports
        several variants, `evaluation`, `gates` and `export` are lists in its order, and each folder
        has a report of its own. A variant that was pushed has `export.push` here, not in the folder.

    Raises:
        CompressError: see the exit codes of its subclasses.
    """
    preflight.check_one_process()
    loaded = _as_loaded(recipe)
    hands = workers_for((stage.settings for stage in loaded.recipe.stages), workers)
    exports = loaded.recipe.export
    preflight.check_targets(exports, Path(work_dir), overwrite=overwrite)
    preflight.check_writable(Path(work_dir))
    preflight.check_calibration(loaded)
    preflight.check_stages(loaded, checkpoints.locate(loaded.recipe.model, weights=False))
    preflight.check_access(exports, strict=strict)
    if not is_streamed(loaded.recipe):  # that way finds what is not finite while it reads
        checkpoints.preflight(loaded.recipe.model)
    from .execution import execute

    work = WorkDirectory(Path(work_dir))
    return execute(
        loaded, work, fresh=fresh, overwrite=overwrite, strict=strict, workers=hands,
        progress=progress or SilentProgress(),
    )  # fmt: skip


def reproduce(
    folder: str | Path, *, work_dir: str | Path = ".compress", progress: Progress | None = None
) -> dict[str, Any]:
    """Run the recipe of an exported folder again and compare the hashes of its files.

    The recipe is the resolved one of the folder's report, with this folder's export alone. Nothing
    that earlier runs kept is used, nothing is pushed, and nothing is left behind.

    Args:
        folder: written by `run`, also where it was moved since; or a repository it was pushed to, as
            `org/name` or `org/name@revision`.
        work_dir: what is made meanwhile lies in a hidden folder below it.
        progress: told what is happening.

    Returns:
        `folder, reproduced` (True), `files[{name, expected, measured, equal}]` with SHA-256, of all
        files but the report, and `differences`, of the two environments.

    Raises:
        SourceError: the folder does not say how it was made, or the source has changed since.
        VerifyError: files differ; the hint says what differs between the two runs.
        CompressError: as `run`.
    """
    from . import reproduction

    return reproduction.reproduce(folder, Path(work_dir), progress or SilentProgress())


def evaluate(
    folder: str | Path, *, recipe: RecipeSource | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure an exported folder against the original it was made from.

    Args:
        folder: written by `run`.
        recipe: whose `model`, `evaluate` and `require` are used; None: the recipe of the folder's report.
        progress: told what is happening.

    Returns:
        `{"evaluation": {...}, "gates": [...]}`.

    Raises:
        SourceError: there is no such folder, or its report holds no recipe that this version knows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder", hint="name a folder that `compress run` wrote")
    given = None if recipe is None else _as_loaded(recipe).recipe
    from .verification import evaluate_folder

    return evaluate_folder(given, folder, progress or SilentProgress())


def push(folder: str | Path, settings: PushSettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """Push an exported folder to the Hub, after it was verified and before it is called published.

    Args:
        folder: written by `run`.
        settings: the repository, and how to push.
        progress: told what is happening.

    Returns:
        `{"push": {...}}`: see `PushResult`.

    Raises:
        SourceError: there is no such folder, or it is none of ours.
        VerifyError: the folder was rejected or is not what its report says; or what arrived is not.
        PlanError: the download that verifies would not fit on the disk.
        HubError: the Hub or the network refused.
    """
    from .exporters import hub
    from .exporters.hub_bundle import read_report
    from .exporters.verify import verify_folder

    folder = Path(folder)
    read_report(folder)
    verify_folder(folder)
    hub.check_access(settings)
    return {"push": hub.push_folder(folder, settings, progress=progress or SilentProgress()).to_json()}


def verify(
    target: str | Path,
    *,
    revision: str | None = None,
    against: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check that a folder or a repository is what was published.

    Args:
        target: a folder that `run` wrote, or a repository as `org/name` or `org/name@revision`.
        revision: branch, tag or commit of the repository, in place of `@revision`.
        against: the original (a folder, `builtin:NAME` or a Hub id); with it, all figures are measured
            again and held against the recorded ones and the gates.
        device: of these measurements; None: that of the run where this machine has it.
        progress: told what is happening.

    Returns:
        `path, verified` (True), `checks[{name, ok, detail}]`; of a repository `repo` and `commit`; with
        an original `against`, `metrics[{metric, recorded, measured, difference, tolerance, agrees}]` and
        `gates`.

    Raises:
        VerifyError: a check failed; as `exporters.verify.FolderError` it holds the result.
        SourceError: there is no such folder or base, or it is none of ours.
        UsageError: a revision of a folder was asked for, or a device without anything to measure.
        HubError: the Hub or the network refused.
    """
    from .exporters.published import locate
    from .exporters.verify import verify_folder

    if device is not None and against is None:
        raise UsageError("a device computes nothing here without an original", hint="add --against BASE")
    found = locate(target, revision, progress)
    result = verify_folder(found.folder, name=found.name, elsewhere=found.files)
    if found.repo is not None:
        result |= {"repo": found.repo, "commit": found.commit}
    if against is None:
        return result
    from .verification import verify_against

    return verify_against(found.folder, result, against, device, progress or SilentProgress())
