"""Whom a denoiser learns from: the original, or another checkpoint that is named; and block from block.

All that can be refused is refused from configs, before data are drawn for the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...models.blocks import depths
from ...models.open import open_model, open_outline
from ...models.origins import NAME as ORIGINS
from ...models.origins import as_one_run, blocks_before, blocks_of_first, kept_blocks
from ...progress import Progress
from ...recipes.recovery import MaskedDistillSettings
from ...recipes.schema import ModelRef
from .matching import Pairs, matched_blocks
from .memory import original_bytes
from .same_task import check_same_task


def teacher_bytes(spec: ModelSpec, settings: MaskedDistillSettings) -> int:
    """Return the tensor bytes of the model that answers; 0: none is asked.

    Args:
        spec: of the model as the stage finds it.
        settings: of the stage.

    Raises:
        PlanError: it is of another kind, or it cannot be known which of its blocks the model's were.
        SourceError: it cannot be read.
    """
    if not settings.asks_original:
        return 0
    if settings.teacher is None:
        return original_bytes(spec)
    before = open_outline(ModelRef(id=str(spec.source.folder)))
    found = open_outline(ModelRef(id=settings.teacher))
    check_same_task(before, found, settings)
    if settings.features:
        _check_depths(spec, before.config, found.config, settings)
    return found.spec.size().bytes


def _check_depths(
    spec: ModelSpec,
    before: Mapping[str, Any],
    teacher: Mapping[str, Any],
    settings: MaskedDistillSettings,
) -> None:
    """Refuse a depth that is neither of the model, nor of what this run or all runs began with."""
    ours, theirs, told = depths(spec.config), depths(teacher), spec.source.origins
    first = {name: row["of"] for name, row in blocks_of_first(told).items()} if told is not None else {}
    if theirs not in (ours, depths(before), {**depths(before), **first}):
        raise _unknown(settings, ours, theirs)


def teacher_config(model: OpenModel, settings: MaskedDistillSettings) -> Mapping[str, Any] | None:
    """Return the config of the model that answers, whose weights are not read; None: none is asked.

    Args:
        model: as the stage finds it.
        settings: of the stage.

    Raises:
        PlanError: it is of another kind, or it is the model itself.
        SourceError: it cannot be read.
    """
    if not settings.asks_original:
        return None
    if settings.teacher is None:
        if not model.changed:
            raise PlanError(
                f"{settings.method}: no stage has changed the model, so it is its own original and has"
                " nothing to learn from it",
                hint="name a `teacher`, or write answers: 0 and features: 0",
            )
        return model.spec.config
    found = open_outline(ModelRef(id=settings.teacher))
    if found.source.folder.resolve() == model.source.folder.resolve():
        _refuse_itself(model, settings)
    check_same_task(model, found, settings)
    return found.config


def named_teacher(model: OpenModel, settings: MaskedDistillSettings, progress: Progress) -> OpenModel:
    """Open the checkpoint that the settings name, on the model's device; see `teacher_config`.

    Raises:
        PlanError: it holds the weights of the model itself.
        SourceError: it cannot be read.
    """
    device = str(next(model.module.parameters()).device)
    assert settings.teacher is not None
    found = open_model(ModelRef(id=settings.teacher), device=device, progress=progress)
    if found.source.hashes == model.source.hashes and found.spec.config == model.spec.config:
        _refuse_itself(model, settings)
    return found


def _refuse_itself(model: OpenModel, settings: MaskedDistillSettings) -> None:
    if not model.changed:
        raise PlanError(
            f"{settings.method}.teacher: {settings.teacher} is the model itself, and no stage has changed it,"
            " so it has nothing to learn from it",
            hint="name another `teacher`, or write answers: 0 and features: 0",
        )


def pairs_with(model: OpenModel, teacher: Mapping[str, Any], settings: MaskedDistillSettings) -> Pairs:
    """Return the blocks of the model and of its teacher that should put out the same.

    Args:
        model: as the stage finds it.
        teacher: config of the other one, completed, with `_class_name`.
        settings: of the stage.

    Raises:
        PlanError: it is not known where the model's blocks were in the teacher.
    """
    ours, theirs, text = depths(model.config), depths(teacher), model.attachments.get(ORIGINS)
    if settings.teacher is None:
        return matched_blocks(teacher, text)
    if ours == theirs:
        return matched_blocks(teacher, None)
    # The teacher may be what the run began with, or what earlier runs removed blocks from.
    for told in () if text is None else (text, as_one_run(text)):
        if _tells(told, ours, theirs):
            return matched_blocks(teacher, told)
    raise _unknown(settings, ours, theirs)


def _unknown(
    settings: MaskedDistillSettings, ours: Mapping[str, int], theirs: Mapping[str, int]
) -> PlanError:
    return PlanError(
        f"{settings.method}.teacher: {settings.teacher} has {_told(theirs)}, and nothing says which of these"
        f" blocks the model's {_told(ours)} were",
        hint=f"put the {ORIGINS} of the model beside its weights, or write features: 0 to learn from"
        " predictions alone",
    )


def _told(known: Mapping[str, int]) -> str:
    return ", ".join(f"{depth} {name}" for name, depth in known.items())


def _tells(text: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Tell whether a file of origins leads from one depth to the other."""
    left = {name: len(places) for name, places in kept_blocks(text).items()}
    return bool(left) and left.items() <= ours.items() and {**ours, **blocks_before(text)} == theirs
