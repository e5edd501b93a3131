"""The heavy half of a run: open, calibrate, stages, then every variant; `publishing` names them.

`pipeline` has refused by then what can be refused without torch. Nothing is lost: every finished
stage is kept in the work directory, and the next run starts after the last of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import publishing, report, streaming
from .calibration.base import Calibration
from .calibration.questions import questions_of
from .calibration.recording import record
from .compressors import registry
from .compressors.base import Workspace
from .errors import PlanError
from .evaluation.by_task import Measurer, evaluator_for
from .evaluation.evaluator import Evaluation
from .evaluation.reference import Reference
from .evaluation.speed import measure_speed
from .exporters.formats import as_shipped, write
from .fitting_answers import answer_keys
from .fitting_data import stage_data
from .history import entry_of, source_hash
from .images_ahead import RunImages, images_of
from .interim import Interim
from .models.base import OpenModel
from .models.open import open_model
from .planning import check_plan
from .progress import Progress, step
from .recipes.export import ExportSettings
from .recipes.loader import LoadedRecipe
from .recipes.schema import Recipe
from .recipes.streamed import is_streamed
from .recipes.workers import RaySettings, Workers
from .report import describe_model
from .resuming import Reopener, resume
from .runtime.atomic import remove_folder, scratch_folder, sweep_partials
from .runtime.memory import return_freed_memory
from .state import Product, Run, Warnings
from .variants import Variant, make_variant
from .workdir import WorkDirectory, digest


def resolve_device(name: str) -> str:
    """Turn `auto` into the device that this machine has.

    Raises:
        PlanError: a device was asked for that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"device {name}: no CUDA device is available", hint="use --device cpu")
    return name


def produce(state: Run, device: str, place: Callable[[ExportSettings], Path]) -> list[Variant]:
    """Open the model, run the stages, and fill one folder per export; none gets its final name here.

    Args:
        state: the run; it holds the lock of its work directory.
        device: from `resolve_device`.
        place: returns an empty folder for an export; called when it is that one's turn.
    """
    recipe, progress = state.recipe, state.progress
    if is_streamed(recipe):
        return streaming.produce(state, place)
    model = open_model(recipe.model, device=device, progress=progress)
    described = describe_model(model.spec)
    images = images_of(model, recipe)
    questions = questions_of(recipe, model.source.folder)
    evaluator = evaluator_for(
        model, recipe.evaluate, recipe.seed, recipe.calibration, images.pools, questions
    )
    reference = evaluator.reference(model, state.work.reference, progress, fresh=state.fresh)
    return_freed_memory()
    interim = Interim(evaluator, reference, recipe.stages, state.work.measured, progress)
    stages, samples = _run_stages(state, model, interim, images)
    product = Product(model, described, stages, device, samples)
    measured: dict[str, Evaluation] = {}
    return [
        _variant(state, product, export, place(export), evaluator, reference, measured)
        for export in recipe.export
    ]


def _variant(
    state: Run,
    product: Product,
    export: ExportSettings,
    folder: Path,
    evaluator: Measurer,
    reference: Reference,
    measured: dict[str, Evaluation],
) -> Variant:
    """Measure and export one variant; `measured` keeps what variants that compute the same share."""
    # What is measured is what is shipped: some formats compute otherwise than our own runtime.
    shipped = as_shipped(product.model, export.format, padded=export.padded)
    own = f"{export.format}{' padded' if export.padded else ''}"
    same = "the model itself" if shipped is product.model else own
    if same not in measured:
        measured[same] = evaluator.compare(shipped, reference, state.progress)
        _add_speed(state, product, shipped, measured[same])
    found = measured[same]
    evaluation = replace(
        found, metrics=dict(found.metrics), images=_with_those_between(found.images, product.samples)
    )
    variant = make_variant(state, product, export, folder, shipped, evaluation)
    del shipped  # the tensors of this variant; the next one makes its own
    return_freed_memory()
    return variant


def _add_speed(state: Run, product: Product, shipped: OpenModel, evaluation: Evaluation) -> None:
    """Time original and result, where the recipe asks for it; or take over what is known of them."""
    settings, seed = state.recipe.evaluate.speed, state.recipe.seed
    if settings is None:
        return
    found = state.recorded_speed
    if found is None:
        original = Reopener(state.recipe.model, product.device, None)()
        found = measure_speed(original, shipped.module, settings, seed, state.progress)
    evaluation.add_speed(found)


def _with_those_between(images: Mapping[str, Tensor], between: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the samples of the model between its stages between the original's and the result's."""
    if not images:
        return {}
    *before, last = images
    return {**{name: images[name] for name in before}, **between, last: images[last]}


def _stage_keys(
    recipe: Recipe, model: OpenModel, calibration_key: str, data: Mapping[int, str]
) -> list[tuple[str, str]]:
    """Return (hash of the input, key) per stage; a key contains all that the result depends on.

    Args:
        data: index of a stage -> hash of what it trains on, where the calibration's key does not say it.
    """
    keys: list[tuple[str, str]] = []
    previous = source_hash(model.source, model.spec.dtype, model.config)
    for index, stage in enumerate(recipe.stages):
        key = digest(
            {
                **({"data": data[index]} if index in data else {}),
                "input": previous,
                "method": stage.method,
                "method_version": registry.get(stage.method).version,
                "settings": stage.settings.model_dump(mode="json"),
                "calibration": calibration_key,
                "seed": recipe.seed,
                "versions": report.versions(),
            }
        )
        keys.append((previous, key))
        previous = key
    return keys


def _run_stages(
    state: Run, model: OpenModel, interim: Interim, images: RunImages
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Apply the stages to `model`, reusing the longest finished prefix.

    Returns:
        The report's `stages`, and samples of a denoiser between them.
    """
    recipe, work = state.recipe, state.work
    if not recipe.stages:
        return [], {}
    calibration = record(
        model,
        recipe.calibration,
        seed=recipe.seed,
        cache=work.calibration,
        progress=state.progress,
        fresh=state.fresh,
        pools=images.pools,
        reads=any(stage.settings.calibrates for stage in recipe.stages),
    )
    folder = model.source.folder
    data = {
        **stage_data(recipe, folder, model.source.revision), **images.data, **answer_keys(recipe, folder)
    }  # fmt: skip
    keys = _stage_keys(recipe, model, calibration.key, data)
    folders = [
        work.stage_folder(key, stage.method) for (_, key), stage in zip(keys, recipe.stages, strict=True)
    ]
    records: list[dict[str, Any]] = []
    for folder in folders if not state.fresh else ():
        found = work.read_stage(folder)
        if found is None:
            break
        found["resumed"] = True
        records.append(found)
    if records:
        _resume_prefix(model, folders[: len(records)], interim)
        state.progress.note(f"{len(records)} finished stage{'s' if len(records) > 1 else ''} reused")
    for index in range(len(records), len(recipe.stages)):
        before = folders[index - 1] if index else None
        workspace = _workspace(state, model, before, folders[index])
        records.append(
            _run_stage(state, model, index, calibration, keys[index][0], folders[index], workspace)
        )
        interim.measure(index, model, folders[index])
    for index, item in enumerate(records):
        item["details"].update(interim.kept(index, folders[index]))
    told = [{key: value for key, value in item.items() if key != "files"} for item in records]
    return told, interim.samples(folders)


def _resume_prefix(model: OpenModel, folders: Sequence[Path], interim: Interim) -> None:
    """Put the last of the finished stages in the place of the model; measure what was not yet."""
    for index, folder in enumerate(folders):
        missing = interim.wanted(index) and not interim.kept(index, folder)
        if missing or index == len(folders) - 1:
            resume(model, folder)
        if missing:
            interim.measure(index, model, folder)


def _workspace(state: Run, model: OpenModel, before: Path | None, folder: Path) -> Workspace:
    """Return where the stage that will be kept in `folder` works; `before` holds its input."""
    working = state.work.working_folder(folder)
    if state.fresh:
        remove_folder(working)
        working.mkdir()
    state.work.measured.mkdir(exist_ok=True)
    device = str(next(model.module.parameters()).device)
    ray = state.workers if isinstance(state.workers, RaySettings) else None
    return Workspace(
        working,
        state.work.measured,
        state.workers if isinstance(state.workers, int) else 1,
        Reopener(state.recipe.model, device, before),
        Reopener(state.recipe.model, device, None),
        state.fresh,
        ray,
    )


def _run_stage(
    state: Run,
    model: OpenModel,
    index: int,
    calibration: Calibration,
    input_hash: str,
    folder: Path,
    workspace: Workspace,
) -> dict[str, Any]:
    stage = state.recipe.stages[index]
    method = registry.get(stage.method)
    state.work.log("stage", method=stage.method, folder=folder.name)
    before = model.size()
    with report.measured() as cost, step(state.progress, stage.method):
        details = method.apply(model, stage.settings, calibration, workspace, state.progress)
    model.history.append(entry_of(stage, state.recipe.seed, input_hash, details))
    record_: dict[str, Any] = {
        "method": stage.method,
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "resumed": False,
        "before": before.to_json(),
        "after": model.size().to_json(),
        "details": details,
    }
    shard = state.recipe.export[0].max_shard_size
    state.work.write_stage(
        folder, record_, lambda temporary: write(model, temporary, "compress", max_shard_size=shard)
    )
    return record_


def execute(
    loaded: LoadedRecipe,
    work: WorkDirectory,
    *,
    fresh: bool,
    overwrite: bool | None,
    strict: bool,
    workers: Workers = 1,
    progress: Progress,
) -> dict[str, Any]:
    """Carry out a recipe that has passed the preflight; see `pipeline.run`."""
    recipe = loaded.recipe
    device = resolve_device(recipe.device)
    targets = [Path(export.path) for export in recipe.export]
    check_plan(loaded, targets, work.root, workers=workers)
    state = Run(loaded, work, Warnings(progress), fresh=fresh, overwrite=overwrite, strict=strict)
    state.workers = workers
    with work.locked():
        work.log("run", recipe=str(loaded.file), model=recipe.model.id)
        with ExitStack() as folders:

            def place(export: ExportSettings) -> Path:
                target = Path(export.path)
                sweep_partials(target.parent, target.name)
                return folders.enter_context(scratch_folder(target))

            document = publishing.settle(state, produce(state, device, place))
        return_freed_memory()
        publishing.push_all(state, document)
        work.log("done", paths=[str(target) for target in targets])
    return document
