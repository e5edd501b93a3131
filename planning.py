"""What a run will come to, predicted from shapes: sizes after every stage, bytes on the disk, memory.

What cannot be reached, or does not fit on this machine, is refused here, before a weight is read.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import preflight, streaming_plan
from .compressors import registry
from .compressors.base import StagePlan
from .errors import PlanError
from .exporters.formats import predict_bytes, predict_tensor_bytes
from .exporters.padded import padded_spec
from .fitting import recovery_notes, sample_notes
from .models.base import ModelSpec
from .models.open import read_spec
from .progress import Progress, step
from .reachable import check_gates
from .recipes.export import ExportSettings
from .recipes.kv_export import KvForm, kv_form
from .recipes.loader import LoadedRecipe
from .recipes.placing import placed
from .recipes.streamed import is_streamed
from .recipes.workers import Workers
from .report import describe_model

# Room for what is neither weights nor statistics: the interpreter and the libraries.
_PROCESS_BYTES = 600 * 2**20


def plan_stages(spec: ModelSpec, loaded: LoadedRecipe, known: Sequence[StagePlan] = ()) -> list[StagePlan]:
    """Plan every stage on the shapes that the stage before it leaves.

    Args:
        spec: of the original.
        loaded: the recipe.
        known: plans of its first stages, which are taken as they are.

    Raises:
        PlanError: a stage cannot be carried out, with its place in the recipe.
    """
    plans = list(known)
    spec = plans[-1].spec if plans else spec
    for index, stage in list(enumerate(loaded.recipe.stages))[len(plans) :]:
        try:
            found = registry.get(stage.method).plan(spec, stage.settings)
            plan_ = streaming_plan.planned(found, spec, loaded.recipe)
        except PlanError as error:
            raise placed(error, loaded, index) from None
        plans.append(plan_)
        spec = plan_.spec
    return plans


def least_plans(spec: ModelSpec, loaded: LoadedRecipe, plans: Sequence[StagePlan]) -> list[StagePlan]:
    """Return the same stages on the smallest models that they may leave; see `StagePlan.least`.

    Args:
        spec: of the original.
        loaded: the recipe.
        plans: of all its stages, on the largest models.

    Raises:
        PlanError: a stage cannot be carried out on such a model, with its place in the recipe.
    """
    found = list(plans)
    for index in range(len(found)):
        one = found[index]
        if one.least is not None:
            smaller = replace(one, spec=one.least, after=one.least.size())
            found = plan_stages(spec, loaded, [*found[:index], smaller])
    return found


def check_plan(
    loaded: LoadedRecipe, targets: Sequence[Path], work_root: Path, *, workers: Workers = 1
) -> None:
    """Plan a recipe and refuse what cannot be reached or does not fit on this machine.

    Args:
        loaded: the recipe, that has passed the preflight.
        targets: where its exports are written, in their order.
        work_root: where a checkpoint per stage is kept.
        workers: processes that a stage may use, or a Ray cluster.

    Raises:
        PlanError: a stage, a format, a gate on size, memory or disk speaks against it.
    """
    recipe = loaded.recipe
    spec = read_spec(recipe.model)
    plans = plan_stages(spec, loaded)
    exports = plan_exports(loaded, spec, plans, least=least_plans(spec, loaded, plans))
    writes = [(target, item.most_bytes) for target, item in zip(targets, exports, strict=True)]
    downloads = [
        write
        for write, export in zip(writes, recipe.export, strict=True)
        if export.push is not None and export.push.verify_remote
    ]
    _check_disks([] if is_streamed(recipe) else plans, writes, work_root, downloads)
    check_memory(plans, workers)


def _check_disks(
    plans: Sequence[StagePlan],
    writes: Sequence[tuple[Path, int]],
    work_root: Path,
    downloads: Sequence[tuple[Path, int]],
) -> None:
    """Refuse a run that the disks cannot hold, before anything is written.

    Args:
        plans: of the stages.
        writes: output folder and bytes of every variant; all of them lie on the disk at once.
        work_root: where a checkpoint per stage is kept, and what the one at work keeps for itself.
        downloads: output folder and bytes of every variant that is fetched again after its push; that
            is put beside the folder, and only one of them is there at a time.
    """
    kept = sum(item.after.bytes for item in plans) + max((item.disk_bytes for item in plans), default=0)
    needs = [*writes, (work_root, kept)]
    by_disk: dict[int, tuple[Path, int]] = {}
    for path, needed in needs:
        parent = preflight.nearest_existing(path)
        first, sofar = by_disk.get(parent.stat().st_dev, (parent, 0))
        by_disk[parent.stat().st_dev] = (first, sofar + needed)
    largest: dict[int, int] = {}
    for path, size in downloads:
        disk = preflight.nearest_existing(path).stat().st_dev
        largest[disk] = max(largest.get(disk, 0), size)
    for disk, size in largest.items():
        by_disk[disk] = (by_disk[disk][0], by_disk[disk][1] + size)
    for parent, needed in by_disk.values():
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise PlanError(
                f"{parent}: {free:,} bytes are free, the run writes about {needed:,}",
                hint="free some space, or choose --output and --work-dir on other disks",
            )


def check_memory(plans: Sequence[StagePlan], workers: Workers) -> None:
    """Refuse a stage whose processes together need more memory than the machine has.

    Actors of a Ray cluster are not counted: the cluster gives them a place where there is room for them.
    """
    total = preflight.total_memory_bytes()
    for item in plans:
        needed = item.peak_memory_bytes + _PROCESS_BYTES
        most = item.most_workers or sys.maxsize
        count = min(workers, most) if isinstance(workers, int) and item.worker_memory_bytes else 1
        several = count > 1
        if several:
            needed += count * (item.worker_memory_bytes + _PROCESS_BYTES)
        if total and needed > total:
            among = f" with {count} workers" if several else ""
            raise PlanError(
                f"{item.method}: needs about {needed:,} bytes of memory{among}, this machine has {total:,}",
                hint=f"use fewer {'--workers' if several else 'calibration samples'}, or a larger machine",
            )


@dataclass(frozen=True)
class ExportPlan:
    """What an export will hold.

    Attributes:
        export: of the recipe.
        spec: of what is written; its layers are padded where the export is.
        bytes: of the weight files, headers and index included.
        tensor_bytes: of the tensors in them.
        most_bytes: what they take at the most; more than `bytes` only where scores have yet to say how wide
            the widest layers are, to which the others are padded.
        unpadded_bytes: what they would take without padding; None where nothing is padded.
        least_bytes: what they take at the least; None where data do not decide which blocks of different
            sizes stay.
        kv_cache: form of a compressed cache; None where none is compressed.
    """

    export: ExportSettings
    spec: ModelSpec
    bytes: int
    tensor_bytes: int
    most_bytes: int
    unpadded_bytes: int | None = None
    least_bytes: int | None = None
    kv_cache: KvForm | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the plan document's form."""
        document: dict[str, Any] = {"format": self.export.format, "path": str(self.export.path)}
        document |= {"bytes": self.bytes} | ({} if self.kv_cache is None else {"kv_cache": self.kv_cache})
        if self.least_bytes is not None:
            document["bytes_at_least"] = self.least_bytes
        if self.unpadded_bytes is None:
            return document
        return {**document, "bytes_at_most": self.most_bytes, "bytes_unpadded": self.unpadded_bytes}


def plan_exports(
    loaded: LoadedRecipe,
    before: ModelSpec,
    plans: Sequence[StagePlan],
    *,
    least: Sequence[StagePlan] = (),
    decided: bool = False,
) -> list[ExportPlan]:
    """Predict every export, and refuse gates that the plan shows to be out of reach.

    Args:
        loaded: the recipe.
        before: of the original.
        plans: of the stages.
        least: of `least_plans`: only what the smallest model cannot reach is out of reach.
        decided: the first stage has decided on the data what it removes.

    Raises:
        PlanError: naming the gate and what is predicted; or a format cannot express the layers.
    """
    after = plans[-1].spec if plans else before
    smallest = least[-1].spec if least else after
    found = []
    for export in loaded.recipe.export:
        form = kv_form([stage.method for stage in loaded.recipe.stages], export)
        item = _plan_export(export, before, after, decided, form)
        low = item if smallest is after else _plan_export(export, before, smallest, decided, form)
        check_gates(loaded.recipe, export, before, low.spec, low.tensor_bytes, decided=decided)
        found.append(item if low.bytes == item.bytes else replace(item, least_bytes=low.bytes))
    return found


def _plan_export(
    export: ExportSettings, before: ModelSpec, after: ModelSpec, decided: bool, form: KvForm | None
) -> ExportPlan:
    def predict(spec: ModelSpec) -> int:
        return predict_bytes(spec, export.format, max_shard_size=export.max_shard_size, kv_cache=form)

    if not export.padded:
        found, stored = predict(after), predict_tensor_bytes(after, export.format, kv_cache=form)
        return ExportPlan(export, after, found, stored, found, kv_cache=form)
    spec = padded_spec(after, export.format)
    # Planned layers are equally wide, and the widest of the real ones decides: the original's at the most.
    most = spec if decided else before
    unpadded = predict_bytes(after, "compress", max_shard_size=export.max_shard_size)
    stored = predict_tensor_bytes(spec, export.format)
    return ExportPlan(export, spec, predict(spec), stored, predict(most), unpadded)


def plan_document(loaded: LoadedRecipe, progress: Progress) -> dict[str, Any]:
    """Return the plan document of a recipe that has passed the preflight."""
    spec = read_spec(loaded.recipe.model)
    with step(progress, "plan"):
        plans = plan_stages(spec, loaded)
        least = least_plans(spec, loaded, plans)
        exports = plan_exports(loaded, spec, plans, least=least)
    return document_of(loaded, spec, plans, exports, least)


def document_of(
    loaded: LoadedRecipe,
    spec: ModelSpec,
    plans: Sequence[StagePlan],
    exports: Sequence[ExportPlan],
    least: Sequence[StagePlan] = (),
) -> dict[str, Any]:
    """Put a plan into the form of its document; of `least_plans` the sizes where they are others."""
    recipe = loaded.recipe
    written = [item.to_json() for item in exports]
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": describe_model(spec),
        "stages": [
            {
                "method": item.method,
                "before": item.before.to_json(),
                "after": item.after.to_json(),
                **({"after_at_least": low.after.to_json()} if low.after != item.after else {}),
                "peak_memory_bytes": item.peak_memory_bytes + _PROCESS_BYTES,
                "notes": [
                    *item.notes,
                    *sample_notes(recipe, index),
                    *recovery_notes(recipe, index, spec.family.name),
                ],
                "layers": list(item.layers),
            }
            for index, (item, low) in enumerate(zip(plans, least or plans, strict=True))
        ],
        "export": written[0] if len(written) == 1 else written,
    }
