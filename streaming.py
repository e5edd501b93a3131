"""A run from disk to disk: named experts stay, the others are left behind, and no memory holds the model.

The stage is applied to the model without its weights, which says everything about the result but tensor
data; these go from file to file, and a fresh process compares what was written with the source. No outputs
are computed, so nothing but sizes is measured; see `recipes.streamed` for when a run goes this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import report
from .calibration.text import NoText
from .compressors import registry
from .compressors.base import Workspace
from .evaluation.evaluator import Evaluation
from .evaluation.size import linear_inventory, size_metrics
from .exporters.attachments import attached
from .exporters.experts_on_disk import cut_on_disk
from .exporters.formats import ExportInfo
from .exporters.tensor_comparison import check_copies
from .exporters.tensor_process import compare_in_fresh_process
from .exporters.writer import dtype_code
from .history import entry_of, source_hash
from .models.base import OpenModel
from .models.checkpoint import Checkpoint, locate
from .models.open import open_outline
from .progress import Progress, step
from .recipes.experts import EepSettings
from .recipes.export import ExportSettings
from .recipes.gates import judge
from .recipes.schema import ModelRef, Recipe
from .recipes.streamed import given_experts
from .report import describe_model
from .runtime.hashes import file_sha256
from .state import Run
from .variants import Variant, finish, put_beside


def settings_of(recipe: Recipe) -> EepSettings:
    """Return the settings of the stage of a streamed recipe."""
    settings = given_experts(recipe)
    if settings is None or settings.experts is None:
        raise ValueError("the recipe does not name the experts that stay")
    return settings


@dataclass(frozen=True)
class _Cut:
    """What the stage made, but for tensor data.

    Attributes:
        model: on the meta device, after the stage.
        details: of the report.
        described: the report's `model`.
        before: size of the model before the stage, as the report has it.
    """

    model: OpenModel
    details: dict[str, Any]
    described: dict[str, Any]
    before: dict[str, Any]


def produce(state: Run, place: Callable[[ExportSettings], Path]) -> list[Variant]:
    """Carry out the stage once per export, and fill one folder each; none gets its final name here.

    Args:
        state: the run; it holds the lock of its work directory.
        place: returns an empty folder for an export; called when it is that one's turn.
    """
    if state.recipe.device.startswith("cuda"):
        state.progress.note(
            f"nothing is computed from disk to disk, so device {state.recipe.device} is not used"
        )
    checkpoint = locate(state.recipe.model)
    check_copies(checkpoint)
    cut = _apply(state, checkpoint)
    return [_variant(state, cut, export, place(export)) for export in state.recipe.export]


def _apply(state: Run, checkpoint: Checkpoint) -> _Cut:
    """Apply the stage to the model without its weights."""
    recipe, stage = state.recipe, state.recipe.stages[0]
    model = open_hashed(recipe.model, checkpoint, state.progress)
    described, before = describe_model(model.spec), model.spec.size().to_json()
    input_hash = source_hash(model.source, model.spec.dtype, model.config)
    workspace = Workspace(state.work.root, state.work.measured)
    details = registry.get(stage.method).apply(
        model, stage.settings, NoText(recipe.seed), workspace, state.progress
    )
    model.history.append(entry_of(stage, recipe.seed, input_hash, details))
    return _Cut(model, details, described, before)


def open_hashed(ref: ModelRef, checkpoint: Checkpoint, progress: Progress) -> OpenModel:
    """Return a model without its weights, whose files are read once for their hashes.

    Args:
        ref: of the recipe.
        checkpoint: what `locate(ref)` returned.
        progress: gets one step.
    """
    hashes = {}
    with step(progress, f"checking {ref.id}", sum(path.stat().st_size for path in checkpoint.files)):
        for path in checkpoint.files:
            hashes[path.name] = file_sha256(path)
            progress.advance(path.stat().st_size, path.name)
    model = open_outline(ref)
    model.source = replace(model.source, hashes=hashes)
    model.spec = model.spec.evolve(source=model.source)
    model.module = model.module.to(model.spec.dtype)
    return model


def compare(
    recipe: Recipe, model: OpenModel, folder: Path, size_bytes: int, progress: Progress
) -> tuple[str | None, str]:
    """Compare a written folder with its source; see `compare_in_fresh_process`.

    Args:
        recipe: that was carried out.
        model: as it was opened, or after the stage.
        folder: what was written.
        size_bytes: of its tensors, for the progress.
        progress: gets one step.
    """
    settings = settings_of(recipe)
    return compare_in_fresh_process(
        model.source.folder, folder, settings.experts or {}, active=settings.active_experts,
        dtype=dtype_code(model.spec.dtype), size_bytes=size_bytes, progress=progress,
    )  # fmt: skip


def _variant(state: Run, cut: _Cut, export: ExportSettings, folder: Path) -> Variant:
    """Write, compare and describe one variant."""
    recipe, settings = state.recipe, settings_of(state.recipe)
    kept, method = settings.experts or {}, recipe.stages[0].method
    with report.measured() as cost, step(state.progress, method):
        info = cut_on_disk(
            recipe.model, kept, folder, progress=state.progress, active=settings.active_experts,
            max_shard_size=export.max_shard_size, history=cut.model.history,
        )  # fmt: skip
        for name, text in attached(cut.model.attachments).items():
            (folder / name).write_text(text, encoding="utf-8")
        put_beside(state, cut.model.source, folder)
    with step(state.progress, "verify"):
        failure, note = compare(recipe, cut.model, folder, info.tensor_bytes, state.progress)
    stage = {
        "method": method,
        "seconds": cost.seconds,
        "peak_rss_bytes": cost.peak_rss_bytes,
        "resumed": False,
        "before": cut.before,
        "after": cut.model.dense().size().to_json(),
        "details": cut.details,
    }
    metrics = size_metrics(cut.model, info.tensor_bytes)
    evaluation = Evaluation(metrics=metrics, details={"linears": linear_inventory(cut.model)})
    parts = {
        "recipe": state.recorded_recipe or recipe.model_dump(mode="json"),
        "model": cut.described,
        "stages": [stage],
        "evaluation": {"metrics": evaluation.metrics, **evaluation.details},
        "gates": judge(recipe.require, metrics),
        "export": _exported(export, info, failure, note),
    }
    return finish(state, export, folder, parts, evaluation, failure, device="cpu")


def _exported(export: ExportSettings, info: ExportInfo, failure: str | None, note: str) -> dict[str, Any]:
    """Return the report's `export`; the files are listed when the last of them is there."""
    return {
        "path": str(export.path),
        "format": info.format,
        "bytes": info.bytes,
        "verified": failure is None,
        "max_abs_error": 0.0 if failure is None else None,
        "loads_with": list(info.loads_with),
        "notes": [*info.notes, failure or note],
    }
