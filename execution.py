"""The heavy half of a run: open, calibrate, stages, evaluate, export, verify, publish.

`pipeline` has refused by then what can be refused without torch. Nothing is lost: every finished
stage is kept in the work directory. The output folder is whole or absent: it is written beside its
final name, reopened in a fresh process, held against the gates, and only then renamed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import preflight, report
from .calibration.diffusion import DiffusionCalibration, record
from .compressors import registry
from .compressors.base import StagePlan
from .errors import PlanError, VerifyError
from .evaluation.evaluator import Evaluation, Evaluator
from .evaluation.size import size_metrics
from .exporters.card import write_card
from .exporters.figures import write_figures
from .exporters.formats import predict_bytes, write
from .exporters.fresh_process import verify_export
from .models.base import ModelSpec, OpenModel
from .models.open import open_model, read_spec
from .progress import Progress, step
from .recipes.loader import LoadedRecipe
from .recipes.schema import Recipe, Stage
from .runtime.atomic import commit_folder, sweep_partials, temporary_beside
from .runtime.load import read_checkpoint
from .runtime.manifest import HistoryEntry
from .workdir import WorkDirectory, digest, file_sha256, remove_folder

# Room for what is neither weights nor statistics: the interpreter and the libraries.
_PROCESS_BYTES = 600 * 2**20


@dataclass
class _Run:
    """What the steps of one run hand to each other."""

    loaded: LoadedRecipe
    work: WorkDirectory
    fresh: bool
    strict: bool
    progress: Progress
    started: float = field(default_factory=time.monotonic)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


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


def plan_stages(spec: ModelSpec, recipe: Recipe) -> list[StagePlan]:
    """Plan every stage on the shapes that the stage before it leaves."""
    plans: list[StagePlan] = []
    for stage in recipe.stages:
        plan_ = registry.get(stage.method).plan(spec, stage.settings)
        plans.append(plan_)
        spec = plan_.spec
    return plans


def _describe_model(spec: ModelSpec) -> dict[str, Any]:
    return {
        "id": spec.source.id,
        "revision": spec.source.revision,
        "class": spec.config.get("_class_name"),
        "family": spec.family.name,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "hashes": dict(spec.source.hashes),
        **spec.size().to_json(),
    }


class _Warnings:
    """Passes everything on and remembers the warnings, for `strict`."""

    def __init__(self, inner: Progress) -> None:
        self.messages: list[str] = []
        self.start, self.advance, self.finish, self.note = (
            inner.start,
            inner.advance,
            inner.finish,
            inner.note,
        )
        self._inner = inner

    def warn(self, message: str) -> None:
        self.messages.append(message)
        self._inner.warn(message)


def _check_resources(plans: Sequence[StagePlan], export_bytes: int, target: Path) -> None:
    """Refuse a run that cannot fit, before anything is written."""
    parent = target.absolute()
    while not parent.exists():
        parent = parent.parent
    needed = export_bytes + sum(item.after.bytes for item in plans)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PlanError(
            f"{parent}: {free:,} bytes are free, the run writes about {needed:,}",
            hint="free some space, or choose --output and --work-dir on another disk",
        )
    total = preflight.total_memory_bytes()
    for item in plans:
        if total and item.peak_memory_bytes + _PROCESS_BYTES > total:
            raise PlanError(
                f"{item.method}: needs about {item.peak_memory_bytes + _PROCESS_BYTES:,} bytes of memory,"
                f" this machine has {total:,}",
                hint="use fewer calibration samples, or a larger machine",
            )


def _run_locked(state: _Run) -> tuple[dict[str, Any], Path]:
    """Do the work and return the report and the finished, verified, still hidden folder."""
    recipe, progress = state.recipe, state.progress
    device = resolve_device(recipe.device)
    model = open_model(recipe.model, device=device, progress=progress)
    described = _describe_model(model.spec)
    evaluator = Evaluator(recipe.evaluate, recipe.seed, recipe.calibration)
    reference = evaluator.reference(model, state.work.reference, progress)
    stages = _run_stages(state, model)
    evaluation = evaluator.compare(model, reference, progress)

    target = Path(recipe.export.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_partials(target.parent)
    folder = temporary_beside(target)
    folder.mkdir()
    try:
        document = _export(state, model, folder, evaluation)
        document["model"], document["stages"] = described, stages
        document["environment"] = report.environment(
            recipe.seed, device, torch.get_num_threads(), state.started
        )
        _write_documents(state, folder, document, evaluation)
    except VerifyError as error:
        raise _rejected(state, folder, target, error.message) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return {key: document[key] for key in report.TOP_KEYS}, folder


def _stage_keys(recipe: Recipe, model: OpenModel, calibration_key: str) -> list[str]:
    """Return one key per stage; each contains all that its result depends on."""
    keys: list[str] = []
    previous = digest([sorted(model.source.hashes.items()), str(model.spec.dtype), model.config])
    for stage in recipe.stages:
        previous = digest(
            {
                "input": previous,
                "method": stage.method,
                "method_version": registry.get(stage.method).version,
                "settings": stage.settings.model_dump(mode="json"),
                "calibration": calibration_key,
                "seed": recipe.seed,
                "versions": report.versions(),
            }
        )
        keys.append(previous)
    return keys


def _run_stages(state: _Run, model: OpenModel) -> list[dict[str, Any]]:
    """Apply the stages to `model`, reusing the longest finished prefix."""
    recipe, work = state.recipe, state.work
    if not recipe.stages:
        return []
    calibration = record(
        model, recipe.calibration, seed=recipe.seed, cache=work.calibration, progress=state.progress
    )
    keys = _stage_keys(recipe, model, calibration.key)
    folders = [work.stage_folder(key, stage.method) for key, stage in zip(keys, recipe.stages, strict=True)]
    records: list[dict[str, Any]] = []
    for folder in folders if not state.fresh else ():
        found = work.read_stage(folder)
        if found is None:
            break
        found["resumed"] = True
        records.append(found)
    if records:
        _resume(model, folders[len(records) - 1], len(records), state.progress)
    for index in range(len(records), len(recipe.stages)):
        records.append(
            _run_stage(state, model, recipe.stages[index], calibration, keys[index], folders[index])
        )
    return [{key: value for key, value in item.items() if key != "files"} for item in records]


def _resume(model: OpenModel, folder: Path, count: int, progress: Progress) -> None:
    module, manifest = read_checkpoint(folder)
    model.module = module.to(next(model.module.parameters()).device)
    model.quantization = dict(manifest.quantization)
    model.history = list(manifest.history)
    progress.note(f"{count} finished stage{'s' if count > 1 else ''} reused")


def _run_stage(
    state: _Run,
    model: OpenModel,
    stage: Stage,
    calibration: DiffusionCalibration,
    key: str,
    folder: Path,
) -> dict[str, Any]:
    method = registry.get(stage.method)
    state.work.log("stage", method=stage.method, key=key)
    before = model.size()
    with report.measured() as cost, step(state.progress, stage.method):
        details = method.apply(model, stage.settings, calibration, state.progress)
    model.history.append(
        HistoryEntry(
            method=stage.method,
            settings=stage.settings.model_dump(mode="json"),
            seed=state.recipe.seed,
            input_hash=key,
            versions=report.versions(),
            details={name: value for name, value in details.items() if name != "layers"},
        )
    )
    record_: dict[str, Any] = {
        "method": stage.method,
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "resumed": False,
        "before": before.to_json(),
        "after": model.size().to_json(),
        "details": details,
    }
    shard = state.recipe.export.max_shard_size
    state.work.write_stage(
        folder, record_, lambda temporary: write(model, temporary, "compress", max_shard_size=shard)
    )
    return record_


def _export(state: _Run, model: OpenModel, folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Write the weights, reopen them in a fresh process, and judge the gates."""
    recipe = state.recipe
    with step(state.progress, f"export {recipe.export.format}"):
        info = write(model, folder, recipe.export.format, max_shard_size=recipe.export.max_shard_size)
        (folder / "recipe.yaml").write_text(state.loaded.text, encoding="utf-8")
    # What a format unpacks or rounds back takes more room than the module does in memory.
    stored = None if recipe.export.format == "compress" else info.bytes
    evaluation.metrics.update(size_metrics(model, stored))
    with step(state.progress, "verify in a fresh process"):
        verification = verify_export(model, folder, seed=recipe.seed, progress=state.progress)
    evaluation.metrics["max_abs_error"] = verification.max_abs_error
    return {
        "recipe": recipe.model_dump(mode="json"),
        "evaluation": {"metrics": evaluation.metrics, **evaluation.details},
        "gates": report.check_gates(recipe.require, evaluation.metrics),
        "export": {
            "path": str(recipe.export.path),
            "format": info.format,
            "bytes": info.bytes,
            "verified": verification.verified,
            "max_abs_error": verification.max_abs_error,
            "loads_with": list(verification.loads_with),
            "notes": list(verification.notes),
        },
    }


def _write_documents(state: _Run, folder: Path, document: dict[str, Any], evaluation: Evaluation) -> None:
    """Add pictures, card and report; hash everything but the report itself."""
    document = {key: document[key] for key in report.TOP_KEYS} | {}
    figures = write_figures(folder, evaluation, document)
    write_card(folder, document, figures, recipe_text=state.loaded.text)
    document["export"]["files"] = [
        {
            "name": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _publish(
    state: _Run, document: dict[str, Any], folder: Path, target: Path, warnings: Sequence[str]
) -> None:
    """Give the folder its final name, or keep it as NAME.rejected.

    Raises:
        VerifyError: the verification, a gate, or under `strict` a warning speaks against it.
    """
    reasons = [
        f"{row['metric']} is {_figure(row['measured'])}, required {row['expected']}"
        for row in document["gates"]
        if not row["passed"]
    ]
    if state.strict:
        reasons.extend(f"warning under --strict: {message}" for message in warnings)
    if reasons:
        raise _rejected(state, folder, target, "; ".join(reasons))
    if target.exists():
        remove_folder(target)
    commit_folder(folder, target)


def _rejected(state: _Run, folder: Path, target: Path, reasons: str) -> VerifyError:
    """Keep a result that may not ship as NAME.rejected and return the error that says so."""
    place = target.with_name(target.name + ".rejected")
    if place.exists():
        remove_folder(place)
    commit_folder(folder, place)
    state.work.log("rejected", path=str(place), reasons=reasons)
    return VerifyError(reasons, hint=f"nothing was published; the result is kept in {place}")


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def plan_document(loaded: LoadedRecipe, progress: Progress) -> dict[str, Any]:
    """Return the plan document of a recipe that has passed the preflight."""
    recipe = loaded.recipe
    spec = read_spec(recipe.model)
    with step(progress, "plan"):
        plans = plan_stages(spec, recipe)
    final = plans[-1].spec if plans else spec
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": _describe_model(spec),
        "stages": [
            {
                "method": item.method,
                "before": item.before.to_json(),
                "after": item.after.to_json(),
                "peak_memory_bytes": item.peak_memory_bytes + _PROCESS_BYTES,
                "notes": list(item.notes),
                "layers": list(item.layers),
            }
            for item in plans
        ],
        "export": {
            "format": recipe.export.format,
            "path": str(recipe.export.path),
            "bytes": predict_bytes(final, recipe.export.format),
        },
    }


def execute(
    loaded: LoadedRecipe, work: WorkDirectory, *, fresh: bool, strict: bool, progress: Progress
) -> dict[str, Any]:
    """Carry out a recipe that has passed the preflight; see `pipeline.run`."""
    target = Path(loaded.recipe.export.path)
    warnings = _Warnings(progress)
    state = _Run(loaded, work, fresh, strict, warnings)
    spec = read_spec(loaded.recipe.model)
    plans = plan_stages(spec, loaded.recipe)
    final = plans[-1].spec if plans else spec
    _check_resources(plans, predict_bytes(final, loaded.recipe.export.format), target)
    with work.locked():
        work.log("run", recipe=str(loaded.file), model=loaded.recipe.model.id)
        document, folder = _run_locked(state)
        _publish(state, document, folder, target, warnings.messages)
        work.log("done", path=str(target))
    return document


def evaluate_folder(loaded: LoadedRecipe, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure an exported folder against its original; see `pipeline.evaluate`."""
    recipe = loaded.recipe
    model = open_model(recipe.model, device=resolve_device(recipe.device), progress=progress)
    evaluator = Evaluator(recipe.evaluate, recipe.seed, recipe.calibration)
    reference = evaluator.reference(model, None, progress)
    module, manifest = read_checkpoint(folder)
    model.module, model.quantization = module, dict(manifest.quantization)
    result = evaluator.compare(model, reference, progress)
    result.metrics.update(size_metrics(model))
    return {
        "evaluation": {"metrics": result.metrics, **result.details},
        "gates": report.check_gates(recipe.require, result.metrics),
    }
