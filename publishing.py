"""The end of a run: write the folder, reopen it, judge it, and give it its name.

The folder is written under a hidden name beside its target. Only after a fresh process has reproduced
the outputs and every gate holds is it renamed; otherwise it is kept, with its report, as NAME.rejected.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import preflight, report
from .calibration.inputs import condition_files
from .errors import VerifyError
from .evaluation.evaluator import Evaluation
from .evaluation.size import size_metrics
from .exporters.card import write_card
from .exporters.figures import write_figures
from .exporters.formats import write
from .exporters.fresh_process import verify_export
from .models.base import OpenModel
from .progress import Progress, step
from .recipes.loader import LoadedRecipe
from .recipes.schema import Recipe
from .runtime.atomic import commit_folder, replace_folder, scratch_folder, sweep_partials
from .workdir import WorkDirectory, file_sha256


class Warnings:
    """A `Progress` that passes everything on and remembers the warnings, for `strict`."""

    def __init__(self, inner: Progress) -> None:
        self.messages: list[str] = []
        self.start, self.advance = inner.start, inner.advance
        self.finish, self.note = inner.finish, inner.note
        self._inner = inner

    def warn(self, message: str) -> None:
        """Remember a warning and pass it on."""
        self.messages.append(message)
        self._inner.warn(message)


@dataclass
class Run:
    """What the steps of one run hand to each other."""

    loaded: LoadedRecipe
    work: WorkDirectory
    progress: Warnings
    fresh: bool
    overwrite: bool
    strict: bool
    started: float = field(default_factory=time.monotonic)

    @property
    def recipe(self) -> Recipe:
        """The validated recipe."""
        return self.loaded.recipe


def publish(
    state: Run,
    model: OpenModel,
    shipped: OpenModel,
    evaluation: Evaluation,
    described: dict[str, Any],
    stages: list[dict[str, Any]],
    device: str,
) -> dict[str, Any]:
    """Export, verify, judge and rename.

    Args:
        state: the run.
        model: after its last stage.
        shipped: what the exported folder computes; see `formats.as_shipped`.
        evaluation: of the model as shipped; gets the metrics that only the folder has.
        described: the report's `model`.
        stages: the report's `stages`.
        device: that the run used.

    Returns:
        The report.

    Raises:
        VerifyError: the verification, a gate, or under `strict` a warning speaks against the result.
    """
    target = Path(state.recipe.export[0].path)
    sweep_partials(target.parent, target.name)
    with scratch_folder(target) as folder:
        parts, failure = _export(state, model, shipped, folder, evaluation)
        parts["model"], parts["stages"] = described, stages
        parts["environment"] = report.environment(
            state.recipe.seed, device, torch.get_num_threads(), state.started
        )
        document = {key: parts[key] for key in report.TOP_KEYS}
        _write_documents(state, folder, document, evaluation)
        _rename(state, folder, target, _reasons(state, document, failure))
    return document


def _export(
    state: Run, model: OpenModel, shipped: OpenModel, folder: Path, evaluation: Evaluation
) -> tuple[dict[str, Any], str | None]:
    """Write the weights, reopen them in a fresh process, and judge the gates.

    Returns:
        Parts of the report, and what the fresh process found wrong, or None.
    """
    recipe = state.recipe
    with step(state.progress, f"export {recipe.export[0].format}"):
        info = write(model, folder, recipe.export[0].format, max_shard_size=recipe.export[0].max_shard_size)
        (folder / "recipe.yaml").write_text(state.loaded.text, encoding="utf-8")
        for path in condition_files(recipe.calibration):
            shutil.copyfile(path, folder / path.name)
    # What a format unpacks or rounds back takes more room than the module does in memory.
    stored = None if recipe.export[0].format == "compress" else info.bytes
    evaluation.metrics.update(size_metrics(shipped, stored))
    with step(state.progress, "verify in a fresh process"):
        verification = verify_export(
            model, folder, seed=recipe.seed, progress=state.progress, shipped=shipped
        )
    if verification.max_abs_error is not None:
        evaluation.metrics["max_abs_error"] = verification.max_abs_error
    if not verification.executed and verification.failure is None:
        state.progress.warn(f"{recipe.export[0].format}: {'; '.join(verification.notes)}")
    parts = {
        "recipe": recipe.model_dump(mode="json"),
        "evaluation": {"metrics": evaluation.metrics, **evaluation.details},
        "gates": report.check_gates(recipe.require, evaluation.metrics),
        "export": {
            "path": str(recipe.export[0].path),
            "format": info.format,
            "bytes": info.bytes,
            "verified": verification.verified,
            "max_abs_error": verification.max_abs_error,
            "loads_with": list(info.loads_with),
            "notes": [*info.notes, *verification.notes],
        },
    }
    return parts, verification.failure


def _write_documents(state: Run, folder: Path, document: dict[str, Any], evaluation: Evaluation) -> None:
    """Add pictures, card and report; hash everything but the report itself."""
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
    (folder / report.FILE_NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _reasons(state: Run, document: dict[str, Any], failure: str | None) -> list[str]:
    """Return what speaks against publishing."""
    reasons = [
        f"{row['metric']} is {_figure(row['measured'])}, required {row['expected']}"
        for row in document["gates"]
        if not row["passed"]
    ]
    if failure is not None:
        reasons.insert(0, failure)
    if state.strict:
        reasons.extend(f"warning under --strict: {message}" for message in state.progress.messages)
    return reasons


def _rename(state: Run, folder: Path, target: Path, reasons: list[str]) -> None:
    """Give the folder its final name, or keep it as NAME.rejected; nothing foreign is replaced.

    Raises:
        UsageError: something that compress did not write has appeared under the name meanwhile.
        VerifyError: with the reasons.
    """
    place = target.with_name(target.name + ".rejected") if reasons else target
    preflight.check_target(place, overwrite=state.overwrite or bool(reasons))
    if place.exists():
        replace_folder(folder, place)
    else:
        commit_folder(folder, place)
    if reasons:
        state.work.log("rejected", path=str(place), reasons=reasons)
        raise VerifyError("; ".join(reasons), hint=f"nothing was published; the result is kept in {place}")


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"
