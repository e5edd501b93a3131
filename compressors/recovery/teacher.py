"""Whom a denoiser learns from: the original, or another checkpoint that is named; and block from block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import PlanError
from ...models.base import ModelSpec, OpenModel
from ...models.blocks import depths
from ...models.open import open_model, read_spec
from ...models.origins import NAME as ORIGINS
from ...models.origins import as_one_run, blocks_before, kept_blocks
from ...progress import Progress
from ...recipes.recovery import MaskedDistillSettings
from ...recipes.schema import ModelRef
from .matching import Pairs, matched_blocks
from .memory import original_bytes

_SAME = (
    "_class_name", "in_channels", "out_channels", "learn_sigma", "sample_size", "patch_size",
    "guidance_embeds",
)  # fmt: skip
_SAME_OF_FEATURES = ("num_attention_heads", "attention_head_dim")


def teacher_bytes(spec: ModelSpec, settings: MaskedDistillSettings) -> int:
    """Return the tensor bytes of the model that answers; 0: none is asked.

    Args:
        spec: of the model as the stage finds it.
        settings: of the stage.

    Raises:
        PlanError: it is of another kind.
        SourceError: it cannot be read.
    """
    if not settings.asks_original:
        return 0
    if settings.teacher is None:
        return original_bytes(spec)
    found = read_spec(ModelRef(id=settings.teacher))
    _check(spec.config, found.config, settings)
    return found.size().bytes


def named_teacher(model: OpenModel, settings: MaskedDistillSettings, progress: Progress) -> OpenModel:
    """Open the checkpoint that the settings name, on the model's device.

    Raises:
        PlanError: it is of another kind.
        SourceError: it cannot be read.
    """
    device = str(next(model.module.parameters()).device)
    assert settings.teacher is not None
    found = open_model(ModelRef(id=settings.teacher), device=device, progress=progress)
    _check(model.config, found.config, settings)
    return found


def _check(ours: Mapping[str, Any], theirs: Mapping[str, Any], settings: MaskedDistillSettings) -> None:
    keys = (*_SAME, *(_SAME_OF_FEATURES if settings.features else ()))
    different = [key for key in keys if ours.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        raise PlanError(
            f"{settings.method}.teacher: {settings.teacher} has {key} {theirs.get(key)!r}, the model has"
            f" {ours.get(key)!r}",
            hint="write features: 0 to learn from predictions alone"
            if key in _SAME_OF_FEATURES
            else "name a model that sees and predicts the same",
        )


def pairs_with(model: OpenModel, teacher: OpenModel, settings: MaskedDistillSettings) -> Pairs:
    """Return the blocks of the model and of its teacher that should put out the same.

    Raises:
        PlanError: it is not known where the model's blocks were in the teacher.
    """
    theirs = depths(teacher.config)
    if settings.teacher is None:
        return matched_blocks(teacher.config, model.attachments.get(ORIGINS))
    if depths(model.config) == theirs:
        return matched_blocks(teacher.config, None)
    text = model.attachments.get(ORIGINS)
    # The teacher may be what the run began with, or what earlier runs removed blocks from.
    for told in () if text is None else (text, as_one_run(text)):
        if _tells(told, depths(model.config), theirs):
            return matched_blocks(teacher.config, told)
    raise PlanError(
        f"{settings.method}.teacher: {settings.teacher} has {theirs}, and nothing says which of these blocks"
        f" the model's {depths(model.config)} were",
        hint="write features: 0 to learn from predictions alone",
    )


def _tells(text: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> bool:
    """Tell whether a file of origins leads from one depth to the other."""
    left = {name: len(places) for name, places in kept_blocks(text).items()}
    return bool(left) and left.items() <= ours.items() and {**ours, **blocks_before(text)} == theirs
