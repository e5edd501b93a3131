"""Measure an exported folder again, against its original: the heavy half of `evaluate` and `verify`.

What is recorded is not believed: the original's weights must have the recorded hashes, the folder is
loaded again in a fresh process, every metric is measured again, and the gates are judged by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from . import report, streaming
from .calibration.questions import questions_of
from .errors import PlanError, RecipeError, SourceError
from .evaluation.agreement import Agreement, compare_metrics
from .evaluation.by_task import evaluator_for
from .evaluation.evaluator import Evaluation
from .evaluation.size import linear_inventory, size_metrics
from .evaluation.speed import measure_speed
from .execution import resolve_device
from .exporters.form import stored_surgery
from .exporters.fresh_process import verify_export
from .exporters.inspection import foreign_schemes
from .exporters.recorded_recipe import recorded_recipe, with_copies
from .exporters.tensors_seen import compared_tensors
from .exporters.verify import FolderError, recorded_environment
from .models.base import OpenModel
from .models.checkpoint import BUILTIN_PREFIX, locate
from .models.open import open_model
from .progress import Progress
from .recipes.gates import failures, judge
from .recipes.schema import ModelRef, Recipe
from .recipes.streamed import is_streamed
from .resuming import take_depth
from .runtime.kv.adapter import is_adapter, open_adapter
from .runtime.kv.scheme import KvCacheScheme
from .runtime.load import load, load_adapter, read_checkpoint
from .runtime.validate import open_folder


def evaluate_folder(recipe: Recipe | None, folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure an exported folder against its original; see `pipeline.evaluate`."""
    exported = report.read_report(folder)
    recipe = recipe or _recorded_recipe(folder, exported)
    model = _original(recipe, recipe.model, resolve_device(recipe.device), progress)
    if _strangers(exported, model):
        raise SourceError(
            f"{folder}: was made from other weights than {recipe.model.id}",
            hint=f"it was made from {exported['model']['id']}; give a recipe with that model",
        )
    result = _measure(recipe, model, folder, exported, progress)
    recorded = exported["export"].get("max_abs_error")
    if recorded is not None and not compared_tensors(exported["export"]):  # of outputs, when it was verified
        result.metrics["max_abs_error"] = recorded
    return {
        "evaluation": {"metrics": result.metrics, **result.details},
        "gates": judge(recipe.require, result.metrics),
    }


def verify_against(
    folder: Path, checked: Mapping[str, Any], against: str, device: str | None, progress: Progress
) -> dict[str, Any]:
    """Measure a folder whose records have been checked, and hold the figures against them.

    Args:
        folder: as `verify_folder` accepted it.
        checked: what that returned; more checks are added to its own.
        against: the original: a folder, `builtin:NAME`, or a Hub id, also with `@revision`.
        device: None: that of the run where this machine has it.
        progress: told what is happening.

    Returns:
        The result with the checks `base`, `outputs`, `figures` and `gates now`, and with `metrics`
        and `gates` as they were measured. Of what went from disk to disk, `tensors now` is in the place of
        `outputs`: no weights are opened then either.

    Raises:
        FolderError: a check failed.
        SourceError: the base is missing or damaged, or the report holds no usable recipe.
        HubError: the Hub or the network refused.
    """
    exported = report.read_report(folder)
    recipe = _recorded_recipe(folder, exported)
    result: dict[str, Any] = {**checked, "checks": list(checked["checks"]), "against": against}
    if not exported["model"]["hashes"]:
        _add(result, "base", "the report records no SHA-256 of the weights it was made from", ok=False)
        raise FolderError(result)
    model = _original(recipe, _base(recipe, exported, against), _device(exported, device), progress)
    others = _strangers(exported, model)
    if others:
        _add(result, "base", f"{against} has other weights than the folder was made from: {others}", ok=False)
        raise FolderError(result, hint=f"it was made from {exported['model']['id']}; name that one")
    _add(result, "base", f"{len(model.source.hashes)} weight files of {against} have the recorded SHA-256")
    evaluation = _measure(recipe, model, folder, exported, progress)
    _check_outputs(result, recipe, model, folder, exported, evaluation, progress)
    agreement = compare_metrics(
        exported["evaluation"]["metrics"],
        evaluation.metrics,
        quality_samples=_quality_samples(recipe),
        fidelity_samples=recipe.evaluate.fidelity.samples if recipe.evaluate.fidelity else None,
        points=recipe.evaluate.fidelity.points if recipe.evaluate.fidelity else 1,
        passkey_samples=_passkey_samples(recipe),
    )
    _check_figures(result, agreement)
    _check_gates(result, recipe, evaluation)
    result["verified"] = all(check["ok"] for check in result["checks"])
    if not result["verified"]:
        raise FolderError(result, hint=_hint(exported))
    return result


def _original(recipe: Recipe, ref: ModelRef, device: str, progress: Progress) -> OpenModel:
    """Open the original; without its weights where the recipe was carried out from disk to disk."""
    if is_streamed(recipe):
        return streaming.open_hashed(ref, locate(ref), progress)
    return open_model(ref, device=device, progress=progress)


def _add(result: dict[str, Any], name: str, detail: str, *, ok: bool = True) -> None:
    result["checks"].append({"name": name, "ok": ok, "detail": detail})
    result["verified"] = result["verified"] and ok


def _strangers(exported: Mapping[str, Any], model: OpenModel) -> str:
    """Return the weight files that are not the recorded ones; a report without hashes knows none."""
    made_from, here = exported["model"]["hashes"], dict(model.source.hashes)
    if not made_from:
        return ""
    return ", ".join(name for name in sorted({*made_from, *here}) if made_from.get(name) != here.get(name))


@dataclass(frozen=True)
class _Loaded:
    """A folder's module, its schemes and sizes, how its cache is compressed, and the bytes of its tensors."""

    module: nn.Module
    quantization: dict[str, Any]
    surgery: dict[str, Any]
    stored_bytes: int
    kv_cache: KvCacheScheme | None


def _load(folder: Path, format_: str, model: OpenModel) -> _Loaded:
    if is_adapter(folder):
        adapter = open_adapter(folder)
        module = load_adapter(adapter, model.source.folder).requires_grad_(False)
        return _Loaded(module, {}, {}, _stored_bytes(folder, model), adapter.document.scheme)
    surgery = stored_surgery(folder, model.family, model.config)
    size_bytes = _stored_bytes(folder, model)
    if format_ == "compress":
        module, manifest = read_checkpoint(folder)
        return _Loaded(module, dict(manifest.quantization), surgery, size_bytes, manifest.kv_cache)
    cache = open_folder(folder).manifest.kv_cache
    return _Loaded(load(folder), foreign_schemes(folder), surgery, size_bytes, cache)


def _stored_bytes(folder: Path, model: OpenModel) -> int:
    """Return the bytes of a folder's tensors, copies once; with an adapter those of the original, too."""
    if is_adapter(folder):
        return model.spec.size().bytes + open_adapter(folder).bytes
    stored = open_folder(folder).tensors
    return sum(entry.bytes for name, entry in stored.items() if name not in model.shared)


def _measure(
    recipe: Recipe, model: OpenModel, folder: Path, exported: Mapping[str, Any], progress: Progress
) -> Evaluation:
    """Record the original, put the folder's module in its place, and measure that."""
    if is_streamed(recipe):
        take_depth(model, folder)
        return Evaluation(metrics=size_metrics(model, _stored_bytes(folder, model)))
    device = next(model.module.parameters()).device
    questions = questions_of(recipe, model.source.folder)
    evaluator = evaluator_for(model, recipe.evaluate, recipe.seed, recipe.calibration, questions=questions)
    reference = evaluator.reference(model, None, progress)
    take_depth(model, folder)
    loaded = _load(folder, exported["export"]["format"], model)
    module, speed = model.family.adopt(loaded.module).to(device), recipe.evaluate.speed
    opened = replace(
        model, module=module, quantization=loaded.quantization, surgery=loaded.surgery,
        kv_cache=loaded.kv_cache,
    )  # fmt: skip
    # Before the first forward, at which some packages unpack what they have loaded.
    sizes, rows = size_metrics(opened, loaded.stored_bytes), linear_inventory(opened)
    taken = measure_speed(model, module, speed, recipe.seed, progress) if speed is not None else None
    model.module, model.quantization, model.surgery = module, loaded.quantization, loaded.surgery
    model.kv_cache = loaded.kv_cache
    evaluation = evaluator.compare(model, reference, progress)
    if taken is not None:
        evaluation.add_speed(taken)
    evaluation.metrics.update(sizes)
    if "linears" in evaluation.details:
        evaluation.details["linears"] = rows
    return evaluation


def _check_outputs(
    result: dict[str, Any],
    recipe: Recipe,
    model: OpenModel,
    folder: Path,
    exported: Mapping[str, Any],
    evaluation: Evaluation,
    progress: Progress,
) -> None:
    """Load the folder in a fresh process every way that it has, and compare with this one."""
    if is_streamed(recipe):
        size_bytes = _stored_bytes(folder, model)
        failure, note = streaming.compare(recipe, model, folder, size_bytes, progress)
        _add(result, "tensors now", failure or note, ok=failure is None)
        return
    if exported["export"]["format"] == "sdnq":
        # These two compare with layers that were there before the export; the folder does not hold them.
        for name in ("max_abs_error", "linear_bytes_ratio"):
            if name in exported["evaluation"]["metrics"]:
                evaluation.metrics[name] = exported["evaluation"]["metrics"][name]
        _add(result, "outputs", "loaded in this process; in the format sdnq not compared with another")
        return
    found = verify_export(model, folder, seed=recipe.seed, progress=progress, shipped=model)
    if found.max_abs_error is not None:
        evaluation.metrics["max_abs_error"] = found.max_abs_error
    equal = f"a fresh process loads it by {' and '.join(found.loads_with)}, with equal outputs"
    _add(result, "outputs", found.failure or equal, ok=found.failure is None)


def _check_figures(result: dict[str, Any], agreement: Agreement) -> None:
    result["metrics"] = [row.to_json() for row in agreement.rows]
    _add(result, "figures", agreement.text, ok=agreement.holds)


def _check_gates(result: dict[str, Any], recipe: Recipe, evaluation: Evaluation) -> None:
    rows = judge(recipe.require, evaluation.metrics)
    failed = failures(rows)
    result["gates"] = rows
    fine = f"{len(rows)} hold by the figures measured now" if rows else "the recipe requires nothing"
    _add(result, "gates now", "; ".join(failed) or fine, ok=not failed)


def _recorded_recipe(folder: Path, exported: Mapping[str, Any]) -> Recipe:
    """Return the resolved recipe of a report, with the copies of prompts or embeddings in the folder.

    It is not read as a recipe file is: nothing in it may name variables of this machine's environment.

    Raises:
        SourceError: it is no recipe that this version knows.
    """
    try:
        recipe = recorded_recipe(exported)
        for part in (exported["evaluation"]["metrics"], exported["model"]["hashes"]):
            part.items()
        for part in (exported["model"]["id"], exported["export"]["format"]):
            part.encode()
    except (RecipeError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise SourceError(
            f"{folder / report.FILE_NAME}: holds no recipe that this version can carry out: {_reason(error)}",
            hint="verify it with the version that made it, or with the packages whose methods it uses",
        ) from None
    return with_copies(recipe, folder)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, RecipeError) else f"{type(error).__name__}: {error}"


def _base(recipe: Recipe, exported: Mapping[str, Any], against: str) -> ModelRef:
    """Return the original: its name as given, its type and component as recorded."""
    recorded = exported["model"]
    name, revision, subfolder = against, None, recipe.model.subfolder
    local = Path(against).expanduser()
    if local.is_dir():
        if subfolder is not None and not (local / subfolder).is_dir():
            subfolder = None
    elif not against.startswith(BUILTIN_PREFIX):
        name, _, named = against.partition("@")
        known = recorded.get("revision") if name == recorded["id"] else None
        revision = named or known
    return ModelRef(id=name, revision=revision, dtype=recipe.model.dtype, subfolder=subfolder)


def _device(exported: Mapping[str, Any], device: str | None) -> str:
    """Return the wanted device, or the one that the figures were measured on where there is one."""
    if device is not None:
        return resolve_device(device)
    recorded = recorded_environment(exported).get("device")
    try:
        return resolve_device(recorded if recorded in ("cpu", "cuda") else "auto")
    except PlanError:
        return resolve_device("auto")


def _quality_samples(recipe: Recipe) -> int | None:
    return recipe.evaluate.quality.samples if recipe.evaluate.quality else None


def _passkey_samples(recipe: Recipe) -> int | None:
    hidden = recipe.evaluate.decoding.passkey if recipe.evaluate.decoding else None
    return hidden.samples * len(hidden.lengths) if hidden else None


def _hint(exported: Mapping[str, Any]) -> str:
    """Say under which conditions the recorded figures were measured."""
    known = recorded_environment(exported)
    versions = known.get("versions")
    torch_version = versions.get("torch") if isinstance(versions, dict) else None
    return (
        f"the recorded figures are of torch {torch_version or 'of an unknown version'} on"
        f" {known.get('device', 'an unknown device')} ({known.get('platform', 'unknown platform')});"
        " measure under the same conditions, or export the folder again"
    )
