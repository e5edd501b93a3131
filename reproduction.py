"""Run the recipe of an exported folder again, and hold every file against its recorded hash.

What the folder was made from is pinned first: the resolved recipe of its report, the commit of a Hub
model, the SHA-256 of the weights, the copies of prompts or embeddings that lie in it, the device and
the number of threads. Nothing that an earlier run kept is used, and nothing is left behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from . import preflight, report
from .errors import PlanError, RecipeError, SourceError, VerifyError
from .exporters import published
from .exporters.card import FILE_NAME as CARD_NAME
from .exporters.card_subject import Subject
from .exporters.recorded_recipe import RECIPE_NAME, check_recipe, copies
from .exporters.verify import is_kept, recorded_device, recorded_environment
from .models import checkpoint as checkpoints
from .progress import Progress, step
from .recipes.answer_files import answer_copies, with_answer_files
from .recipes.export import ExportSettings, PushSettings
from .recipes.loader import LoadedRecipe, load_recipe
from .recipes.schema import Recipe
from .recipes.tree import dotted
from .runtime.atomic import scratch_folder, sweep_partials
from .runtime.hashes import file_sha256
from .workdir import WorkDirectory

_NAME = "reproduction"
_VERIFY = re.compile(r"^    compress verify (\S+)$", re.MULTILINE)
_MOST_THREADS = 1024
_ENVIRONMENT = ("platform", "processor", "device", "accelerator", "threads", "seed")
_SAME = (
    "the recorded versions, machine, device and seed are those of this run: another recipe made the folder"
    " than its report says, or something in it is not deterministic"
)


class ReproductionError(VerifyError):
    """A second run gave other files.

    Attributes:
        result: what `reproduce` would have returned.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        rows = result["files"]
        names = [row["name"] for row in rows if not row["equal"]]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        super().__init__(
            f"{result['folder']}: not reproduced, {len(names)} of {len(rows)} files differ: {shown}",
            hint="; ".join(result["differences"]),
        )
        self.result = result


@dataclass(frozen=True)
class Origin:
    """How a folder was made.

    Attributes:
        report: its report.json.
        loaded: the recipe as it ran, with this folder's export alone and with pinned inputs.
        files: name -> recorded SHA-256, of everything that the run wrote but the report.
    """

    folder: Path
    report: dict[str, Any]
    loaded: LoadedRecipe
    files: dict[str, str]


def reproduce(target: str | Path, work_root: Path, progress: Progress) -> dict[str, Any]:
    """Make a folder again and compare; see `pipeline.reproduce`."""
    found = published.locate(target, progress=progress)
    origin = read_origin(found.folder)
    preflight.check_writable(work_root)
    checkpoint = _check_source(origin, progress)
    preflight.check_stages(origin.loaded, checkpoint)
    is_new = not work_root.exists()
    sweep_partials(work_root, _NAME)
    try:
        with scratch_folder(work_root / _NAME) as scratch:
            document, files = _run_again(origin, scratch, progress)
    finally:
        if is_new and work_root.is_dir() and not any(work_root.iterdir()):
            work_root.rmdir()
    rows = _compare(origin.files, files)
    result = {
        "folder": found.name,
        "reproduced": all(row["equal"] for row in rows),
        "files": rows,
        "differences": _differences(origin.report, document),
    }
    if not result["reproduced"]:
        raise ReproductionError({**result, "differences": result["differences"] or [_SAME]})
    return result


def read_origin(folder: Path) -> Origin:
    """Read how a folder was made, and check that it is still what its report says.

    Raises:
        SourceError: it has no report, or one that does not say how to make the folder again.
        VerifyError: a file was changed since, or its recipe.yaml is another recipe than its report's.
    """
    found = report.read_report(folder)
    recorded_device(found)
    files = _recorded_files(folder, found)
    try:
        loaded = load_recipe(found["recipe"])
        export = _own_export(loaded.recipe, found["export"])
        recipe = _with_own_answers(folder, files, loaded.recipe).model_copy(
            update={
                "export": (export.model_copy(update={"push": _place(folder, found, export.push)}),),
                "model": loaded.recipe.model.model_copy(
                    update={"revision": found["model"]["revision"] or loaded.recipe.model.revision}
                ),
                "calibration": loaded.recipe.calibration.model_copy(
                    update=_copies(folder, files, loaded.recipe)
                ),
            }
        )
        check_recipe(folder, found)
        text = (folder / RECIPE_NAME).read_text(encoding="utf-8")
    except (RecipeError, OSError, KeyError, TypeError, ValueError) as error:
        made_by = recorded_environment(found).get("versions", {}).get("compress", "another version")
        raise SourceError(
            f"{folder}: its report does not say how it was made: {error}",
            hint=f"it was written by compress {made_by}; reproduce it with that version",
        ) from None
    return Origin(folder, found, replace(loaded, recipe=recipe, text=text), files)


def _recorded_files(folder: Path, found: Mapping[str, Any]) -> dict[str, str]:
    """Return name -> SHA-256 as recorded, of the run's files, after a check that all still have it."""
    try:
        rows = found["export"]["files"]
        files = {str(row["name"]): str(row["sha256"]) for row in rows}
        kept = {str(row["name"]) for row in rows if is_kept(row)}
    except (KeyError, TypeError, AttributeError):
        raise SourceError(f"{folder / report.FILE_NAME}: has no readable export.files") from None
    for name, expected in files.items():
        parts = PurePosixPath(name).parts
        path = folder / name
        if not parts or name.startswith("/") or ".." in parts:
            raise SourceError(f"{folder / report.FILE_NAME}: {name!r} is not a file of this folder")
        if not path.is_file() or file_sha256(path) != expected:
            raise VerifyError(
                f"{folder}: {name!r} is not the file that {report.FILE_NAME} describes",
                hint="it was changed or removed since the run; fetch the folder again",
            )
    return {name: expected for name, expected in files.items() if name not in kept}


def _own_export(recipe: Recipe, recorded: Mapping[str, Any]) -> ExportSettings:
    """Return the one of the recipe's exports that made the folder, wherever that lies now."""
    for export in recipe.export:
        if str(export.path) == recorded["path"] and export.format == recorded["format"]:
            return export
    raise ValueError(f"no export of the recipe has the path {recorded['path']!r}")


def _place(folder: Path, found: Mapping[str, Any], push: PushSettings | None) -> PushSettings | None:
    """Return the repository that the card says it is loaded from; None: the folder itself.

    `compress push` writes a card for where it pushes to, so the recipe does not always know.
    """
    card = folder / CARD_NAME
    named = _VERIFY.findall(card.read_text(encoding="utf-8")) if card.is_file() else []
    target = named[-1] if named else Subject(found).target
    if push is not None and target == Subject(found, push.repo, push.revision).target:
        return push
    return None if target == Subject(found).target else PushSettings.model_validate(target)


def _copies(folder: Path, files: Mapping[str, str], recipe: Recipe) -> dict[str, Path]:
    """Return the copies, in the folder, of the files that the recipe samples on."""
    moved = copies(recipe, folder)
    for key, path in moved.items():
        if path.name not in files:
            raise ValueError(f"calibration.{key} names {path.name}, which is not among its files")
    return moved


def _with_own_answers(folder: Path, files: Mapping[str, str], recipe: Recipe) -> Recipe:
    """Return a recipe that asks the copies, in the folder, of the files with answers that it names."""
    moved = answer_copies(recipe, folder)
    for key, path in moved.items():
        if path.name not in files:
            raise ValueError(f"{dotted(key)} names {path.name}, which is not among its files")
    return with_answer_files(recipe, moved)


def _check_source(origin: Origin, progress: Progress) -> checkpoints.Checkpoint:
    """Find the source and hold its weights against the recorded hashes, before anything is computed.

    Raises:
        SourceError: it is not there, or has changed.
    """
    ref, recorded = origin.loaded.recipe.model, origin.report["model"]
    is_folder = recorded.get("revision") is None and not ref.id.startswith(checkpoints.BUILTIN_PREFIX)
    if is_folder and not Path(ref.id).expanduser().is_dir():
        raise SourceError(
            f"{origin.folder}: was made from the folder {ref.id}, which is not here",
            hint="put it back; a relative path is looked up in the current directory",
        )
    with step(progress, f"checking {ref.id}"):
        checkpoint = checkpoints.locate(ref)
        hashes = checkpoints.hash_files(checkpoint)
    expected = recorded.get("hashes")
    if hashes != expected:
        known = expected if isinstance(expected, dict) else {}
        changed = sorted(name for name in {*hashes, *known} if hashes.get(name) != known.get(name))
        raise SourceError(
            f"{ref.id}: {', '.join(changed)} is not what {origin.folder} was made from",
            hint="only from the same weights can the same files be made",
        )
    return checkpoint


def _run_again(origin: Origin, scratch: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, str]]:
    """Carry out the recipe below `scratch`; return the new report and name -> SHA-256 of what it wrote."""
    from . import execution, planning
    from .evaluation.speed import recorded_speed
    from .state import Run, Warnings

    recipe, environment = origin.loaded.recipe, recorded_environment(origin.report)
    made_on = recorded_device(origin.report) or recipe.device
    try:
        device = execution.resolve_device(made_on)
    except PlanError:
        raise PlanError(
            f"{origin.folder}: was made on {made_on}, which this machine does not have",
            hint="reproduce it on a machine of that kind",
        ) from None
    out = scratch / "out"
    planning.check_plan(origin.loaded, [out], scratch)
    state = Run(
        origin.loaded, WorkDirectory(scratch / "work"), Warnings(progress),
        fresh=True, overwrite=False, strict=False, recorded_recipe=origin.report["recipe"],
        recorded_speed=recorded_speed(origin.report.get("evaluation")),
    )  # fmt: skip

    def place(_: ExportSettings) -> Path:
        out.mkdir()
        return out

    with state.work.locked(), _as_many_threads(environment.get("threads")):
        (variant,) = execution.produce(state, device, place)
    rows = variant.document["export"]["files"]
    return variant.document, {row["name"]: row["sha256"] for row in rows}


def _as_many_threads(recorded: Any) -> AbstractContextManager[None]:
    """Compute with as many threads as the first run had: sums depend on how they are split."""
    from .runtime.threads import computing_with

    sensible = isinstance(recorded, int) and 1 <= recorded <= _MOST_THREADS
    return computing_with(recorded) if sensible else nullcontext()


def _compare(expected: Mapping[str, str], measured: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one row per file of either run; None where one of them has no such file."""
    return [
        {
            "name": name,
            "expected": expected.get(name),
            "measured": measured.get(name),
            "equal": expected.get(name) == measured.get(name),
        }
        for name in sorted({*expected, *measured})
    ]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two reports and may explain differing files: causes, then figures."""
    then, here = recorded_environment(before), recorded_environment(now)
    found = _changes("", then.get("versions"), here["versions"])
    found += _changes("", *({key: side.get(key) for key in _ENVIRONMENT} for side in (then, here)))
    evaluation = before.get("evaluation")
    metrics = evaluation.get("metrics") if isinstance(evaluation, dict) else None
    return found + _changes("measured ", metrics, now["evaluation"]["metrics"])


def _changes(label: str, then: Any, now: Mapping[str, Any]) -> list[str]:
    then = then if isinstance(then, dict) else {}
    names = [*now, *(name for name in then if name not in now)]
    return [
        f"{label}{name}: {_shown(then.get(name))} then, {_shown(now.get(name))} now"
        for name in names
        if then.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    return "not known" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
