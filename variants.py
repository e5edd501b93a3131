"""One variant of a result: written under a hidden name, reopened, judged, and described.

Nothing here gives a folder its final name; `publishing` does, when all variants of a run are there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import report
from .calibration.inputs import condition_files
from .evaluation.evaluator import Evaluation
from .evaluation.size import size_metrics
from .exporters.card import write_card
from .exporters.figures import write_figures
from .exporters.formats import write
from .exporters.fresh_process import verify_export
from .exporters.licence import copy_licence
from .exporters.padded import padding_notes
from .exporters.recorded_recipe import RECIPE_NAME
from .models.base import OpenModel, Source
from .models.companions import NAMES, TOKENIZER, companion_files
from .progress import step
from .recipes.answer_files import answer_files
from .recipes.export import ExportSettings
from .recipes.gates import judge
from .recipes.kv_export import kv_form
from .recipes.secrets import redacted
from .state import Product, Run
from .workdir import file_sha256


@dataclass(frozen=True)
class Variant:
    """A finished folder that has no name yet.

    Attributes:
        export: what the recipe says of it.
        folder: where it lies for now.
        document: its report, as in its `report.json`.
        failure: what the fresh process found wrong, or None.
    """

    export: ExportSettings
    folder: Path
    document: dict[str, Any]
    failure: str | None


def make_variant(
    state: Run,
    product: Product,
    export: ExportSettings,
    folder: Path,
    shipped: OpenModel,
    evaluation: Evaluation,
) -> Variant:
    """Fill `folder` with one variant: weights, verification, gates, pictures, card and report.

    Args:
        state: the run.
        product: what the stages made.
        export: format, sizes and repository of this variant.
        folder: exists and is empty.
        shipped: what the exported folder computes; see `formats.as_shipped`.
        evaluation: of the model as shipped; gets the metrics that only the folder has.

    Raises:
        PlanError: the format cannot express the model's layers.
        OSError: the disk is full or refuses.
    """
    # Formats are made of the layers as they run; padding makes a model of other sizes of them first.
    model = shipped if export.padded else product.model
    parts, failure = _export(state, model, export, folder, shipped, evaluation)
    if export.padded:
        parts["export"]["notes"] += padding_notes(product.model, shipped)
    parts["model"], parts["stages"] = product.described, product.stages
    return finish(state, export, folder, parts, evaluation, failure, device=product.device)


def finish(
    state: Run,
    export: ExportSettings,
    folder: Path,
    parts: dict[str, Any],
    evaluation: Evaluation,
    failure: str | None,
    *,
    device: str,
) -> Variant:
    """Describe a folder whose weights are written: pictures, card and report.

    Args:
        state: the run.
        export: of this variant.
        folder: with everything else in it.
        parts: of the report, all but `environment`; the files of `export` are listed here.
        evaluation: what was measured, with samples.
        failure: what the verification found wrong, or None.
        device: that the run used.
    """
    parts["environment"] = report.environment(
        state.recipe.seed, device, torch.get_num_threads(), state.started
    )
    # Errors of the libraries below may quote a URL or a header; nothing of that may be kept.
    document = redacted(json.loads(json.dumps({key: parts[key] for key in report.TOP_KEYS})))
    _write_documents(state, export, folder, document, evaluation)
    return Variant(export, folder, document, failure)


def _export(
    state: Run,
    model: OpenModel,
    export: ExportSettings,
    folder: Path,
    shipped: OpenModel,
    evaluation: Evaluation,
) -> tuple[dict[str, Any], str | None]:
    """Write the weights, reopen them in a fresh process, and judge the gates.

    Returns:
        Parts of the report, and what the fresh process found wrong, or None.
    """
    recipe = state.recipe
    form = kv_form([stage.method for stage in recipe.stages], export)
    with step(state.progress, f"export {export.format}"):
        info = write(model, folder, export.format, max_shard_size=export.max_shard_size, kv_cache=form)
        put_beside(state, model.source, folder)
        # An adapter takes what the original generates by from the original; text needs a tokenizer.
        names = TOKENIZER if form == "adapter" else NAMES
        whole = model.family.library == "transformers"
        for path in companion_files(model.source.folder, names) if whole else ():
            shutil.copyfile(path, folder / path.name)
    # What a format unpacks or rounds back takes more room than the module does in memory.
    evaluation.metrics.update(size_metrics(shipped, info.tensor_bytes))
    with step(state.progress, "verify"):
        verification = verify_export(
            model, folder, seed=recipe.seed, progress=state.progress, shipped=shipped
        )
    if verification.max_abs_error is not None:
        evaluation.metrics["max_abs_error"] = verification.max_abs_error
    if not verification.executed and verification.failure is None:
        state.progress.warn(f"{export.format}: {'; '.join(verification.notes)}")
    parts = {
        "recipe": state.recorded_recipe or recipe.model_dump(mode="json"),
        "evaluation": {"metrics": evaluation.metrics, **evaluation.details},
        "gates": judge(recipe.require, evaluation.metrics),
        "export": {
            "path": str(export.path),
            "format": info.format,
            **({} if form is None else {"kv_cache": form}),
            "bytes": info.bytes,
            "verified": verification.verified,
            "max_abs_error": verification.max_abs_error,
            "loads_with": list(info.loads_with),
            "notes": [*info.notes, *verification.notes],
        },
    }
    return parts, verification.failure


def put_beside(state: Run, source: Source, folder: Path) -> None:
    """Put beside the weights what they were made by and from: the recipe, its files, and the licence."""
    (folder / RECIPE_NAME).write_text(state.loaded.text, encoding="utf-8")
    named = [*condition_files(state.recipe.calibration), *answer_files(state.recipe).values()]
    for path in dict.fromkeys(named):
        shutil.copyfile(path, folder / path.name)
    copy_licence(source, folder, state.progress)


def _write_documents(
    state: Run, export: ExportSettings, folder: Path, document: dict[str, Any], evaluation: Evaluation
) -> None:
    """Add pictures, card and report; hash everything but the report itself."""
    figures = write_figures(folder, evaluation, document)
    write_card(
        folder,
        document,
        figures,
        recipe_text=state.loaded.text,
        place=export.push.repo if export.push else None,
        revision=export.push.revision if export.push else None,
    )
    document["export"]["files"] = [
        {
            "name": path.relative_to(folder).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    _write_report(folder, document)


def record_rejection(variant: Variant, reasons: Sequence[str]) -> None:
    """Say in a variant's report why it was refused, so that it is refused under any name."""
    variant.document["export"]["rejected"] = redacted(list(reasons))
    _write_report(variant.folder, variant.document)


def _write_report(folder: Path, document: dict[str, Any]) -> None:
    (folder / report.FILE_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
