"""Everything that can be refused before torch is imported and before a byte is written.

Wrong recipes and damaged checkpoints are answered in well under two seconds, so what can be known
from the recipe, the folder names, the config and the safetensors headers is checked here.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import combinations, count
from pathlib import Path
from typing import TYPE_CHECKING

from .calibration.inputs import missing_files
from .errors import PlanError, SourceError, UsageError, VerifyError
from .fitting import check_kind
from .fitting_answers import check_answers
from .fitting_data import check_data
from .fitting_experts import check_experts
from .fitting_images import check_images
from .fitting_scenes import check_scenes
from .models.registry import FAMILY_NAMES
from .models.shapes import expected_shapes
from .recipes import patterns
from .recipes.export import PACKAGES, REJECTED, overlap
from .recipes.stages import GridSettings
from .runtime.moe_names import stored_shapes

_TABLES = (".embedding_table.weight", ".embed_tokens.weight", ".style_embedder.weight")
"""Matrices of which rows are looked up: no linear layers."""

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.export import ExportSettings, PushSettings
    from .recipes.loader import LoadedRecipe


def check_targets(exports: Sequence[ExportSettings], work_dir: Path, *, overwrite: bool | None) -> None:
    """Refuse output folders that cannot be written, or that are in each other's way.

    Args:
        exports: of the recipe.
        work_dir: of the run.
        overwrite: replace older results; None: as each export says.

    Raises:
        UsageError, PlanError: as `check_target` and `check_apart`.
    """
    for export in exports:
        instead = f"`{push_command(export.path, export.push)}` pushes it as it is; or " if export.push else ""
        check_target(
            Path(export.path),
            overwrite=export.overwrite if overwrite is None else overwrite,
            instead=instead,
        )
        check_apart(Path(export.path), work_dir)
    for one, other in combinations([Path(export.path) for export in exports], 2):
        if overlap(one, other):
            raise UsageError(
                f"{one} and {other}: these outputs lie within each other, or one is where the other is"
                " kept when it is refused",
                hint="give every export a folder of its own",
            )


def push_command(folder: Path, push: PushSettings) -> str:
    """Return the command that pushes a finished folder as the recipe would have."""
    repo = push.repo + (f"@{push.revision}" if push.revision else "")
    words = ["compress", "push", str(folder), repo]
    if "private" in push.model_fields_set or not push.private:
        words.append("--private" if push.private else "--public")
    words += ["--create-pr"] if push.create_pr else []
    for option, value in (("--tag", push.tag), ("--message", push.message)):
        words += [option, value] if value else []
    words += [] if push.verify_remote else ["--no-verify-remote"]
    words += ["--overwrite"] if push.overwrite else []
    return shlex.join(words)


def check_target(target: Path, *, overwrite: bool, instead: str = "") -> None:
    """Refuse an output folder that exists or cannot be written.

    Args:
        target: output folder.
        overwrite: replace it where it is ours.
        instead: what else could be meant where it exists; for the hint.

    Raises:
        UsageError: it is a link; it exists and `overwrite` is false, or holds what we did not write.
        PlanError: its parent cannot be written.
    """
    if target.is_symlink():
        raise UsageError(f"{target}: is a symbolic link", hint=f"name the folder itself: {target.resolve()}")
    if target.exists():
        foreign = not_ours(target)
        if foreign is None and not overwrite:
            raise UsageError(
                f"{target}: the output folder exists", hint=f"{instead}pass --overwrite, or another --output"
            )
        if foreign is not None:
            raise UsageError(
                f"{target}: holds {foreign}, which compress did not write",
                hint="choose another --output, or remove it yourself",
            )
    check_writable(target.parent)


def check_apart(target: Path, work_dir: Path) -> None:
    """Refuse an output inside the work directory or around it: each is replaced by its own rules.

    Raises:
        UsageError: naming both.
    """
    output, work = _resolved(target), _resolved(work_dir)
    if output == work or output in work.parents or work in output.parents:
        raise UsageError(
            f"{target}: the output and the work directory {work_dir} lie within each other",
            hint="choose another --output or --work-dir",
        )


def _resolved(path: Path) -> Path:
    """Return where a path leads, with links in its parents followed; it need not exist."""
    return path.absolute().resolve()


def rejected_places(target: Path) -> Iterator[Path]:
    """Yield where a refused result is kept: NAME.rejected, and further names should that one be taken."""
    yield _beside(target)
    yield from (target.with_name(f"{target.name}{REJECTED}-{number}") for number in count(2))


def _beside(target: Path) -> Path:
    return target.with_name(target.name + REJECTED)


def not_ours(folder: Path) -> str | None:
    """Return the name of something in `folder` that its report.json does not list, or None."""
    if not folder.is_dir():
        return "a file"
    first = next((entry.name for entry in sorted(folder.iterdir())), None)
    if first is None:
        return None
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        listed = {row["name"] for row in report["export"]["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{first} and no report of a run"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return min(names - listed - {"report.json"}, default=None)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which nothing can be created, without creating anything.

    Raises:
        PlanError: naming the nearest existing parent.
    """
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise PlanError(f"{existing}: is a file, so {folder} cannot be a folder", hint="choose another path")
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise PlanError(f"{existing}: not writable", hint="choose another path, or change its permissions")


def nearest_existing(path: Path) -> Path:
    """Return the path itself or the nearest parent that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_access(exports: Sequence[ExportSettings], *, strict: bool = False) -> None:
    """Ask the Hub, for every export that is pushed, whether it could be; nothing is created.

    Args:
        exports: of the recipe.
        strict: a warning is a refusal, told before the work and not after it.

    Raises:
        VerifyError: a warning under `strict`: an existing repository has another visibility.
        PlanError: the format could not be executed here, and only what was executed is pushed.
        HubError: no token, no network, no right to write, or a tag that is taken.
    """
    pushes = [(export, export.push) for export in exports if export.push is not None]
    for export, push in pushes:
        package = PACKAGES.get(export.format)
        if package is not None and find_spec(package) is None:
            raise PlanError(
                f"{export.path}: to be pushed to {push.repo}, it must be executed, and {package} is not"
                " installed",
                hint=f"install the package {package}, or leave out `push` for this export",
            )
    if pushes:
        from .exporters import hub

        for _, push in pushes:
            warnings = hub.check_access(push, new=True)
            if strict and warnings:
                raise VerifyError(
                    f"warning under --strict: {push.repo}: {'; '.join(warnings)}",
                    hint="set `private` in export.push to what the repository is, or change the repository",
                )


def check_one_process() -> None:
    """Refuse a run that a launcher of distributed training started several times.

    Raises:
        UsageError: this is one of several processes.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and processes != "1":
        raise UsageError(
            f"a run is one process, and a launcher started {processes} of them",
            hint="start `compress run` by itself; --workers uses several processes where a stage can",
        )


def check_calibration(loaded: LoadedRecipe) -> None:
    """Refuse a recipe whose prompts or embeddings are not there.

    Raises:
        SourceError: naming the file and the recipe.
    """
    missing = missing_files(loaded.recipe.calibration)
    if missing:
        raise SourceError(
            f"{missing[0]}: no such file or folder; calibration of {loaded.file or 'the recipe'} names it",
            hint="a relative path is looked up in the current directory, then beside the recipe",
        )


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """Return the dotted names of the checkpoint's linear layers, experts' too, as its config implies them."""
    fused = expected_shapes(checkpoint.class_name, checkpoint.config)
    shapes = stored_shapes(checkpoint.class_name, fused, {})
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.endswith(_TABLES)
    ]


def check_stages(loaded: LoadedRecipe, checkpoint: Checkpoint, *, planned: bool = False) -> None:
    """Hold every stage against the family and the layers of the checkpoint.

    Args:
        loaded: the recipe.
        checkpoint: of its model.
        planned: nothing is run, so questions and answers that are not there are not missed.

    Raises:
        PlanError: a stage does not fit the family; or see `fitting_experts.check_experts`.
        RecipeError: a pattern matches no layer, or a key is of no use for this kind of model; with its
            place in the file.
        SourceError: see `fitting.check_kind`, `fitting_images.check_images`, `fitting_scenes.check_scenes`,
            `fitting_data.check_data`, `fitting_answers.check_answers`.
    """
    family = FAMILY_NAMES[checkpoint.class_name]
    for index, stage in enumerate(loaded.recipe.stages):
        location = ("stages", index, stage.method)
        if family not in stage.settings.families:
            message = f"does not fit the family {family} ({checkpoint.class_name})"
            fits = ", ".join(sorted(stage.settings.families))
            raise PlanError(
                str(loaded.error(location, message)),
                hint=f"{stage.method} fits the families {fits}; see `compress methods`",
            )
    check_kind(loaded, checkpoint)
    for index, stage in enumerate(loaded.recipe.stages):
        if isinstance(stage.settings, GridSettings):
            _check_patterns(loaded, ("stages", index, stage.method, "keep"), stage.settings.keep, checkpoint)
    check_experts(loaded, checkpoint)
    check_images(loaded, checkpoint)
    check_scenes(loaded, checkpoint)
    check_data(loaded, checkpoint)
    check_answers(loaded, checkpoint, planned=planned)


def _check_patterns(
    loaded: LoadedRecipe, location: tuple[str | int, ...], keep: tuple[str, ...], checkpoint: Checkpoint
) -> None:
    names = linear_names(checkpoint)
    for position, pattern in enumerate(keep):
        if patterns.unmatched([pattern], names):
            raise loaded.error(
                (*location, position),
                f"the pattern {pattern!r} matches no linear layer of {checkpoint.class_name}",
                hint=f"patterns match full names, such as {names[0]}; `compress inspect` lists them",
            )


def total_memory_bytes() -> int | None:
    """Return the machine's memory, or the container's limit where that is smaller."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total
