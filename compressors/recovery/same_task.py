"""Do two denoisers see and predict the same? One that does not cannot answer for the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from ...calibration.diffusion_loss import task_for
from ...errors import PlanError
from ...models.base import OpenModel
from ...models.latent_sizes import latent_shape
from ...models.shapes import uses_additional_conditions
from ...recipes.recovery import MaskedDistillSettings

_SAME = (
    "_class_name", "in_channels", "out_channels", "learn_sigma", "sample_size", "patch_size",
    "guidance_embeds",
)  # fmt: skip
_TEXT = ("joint_attention_dim", "pooled_projection_dim")
_CONDITIONS: Mapping[str, Sequence[str]] = {
    # What is conditioned on: of classes also which label means none of them.
    "DiTTransformer2DModel": ("num_embeds_ada_norm",),
    "PixArtTransformer2DModel": ("caption_channels",),
    "SD3Transformer2DModel": _TEXT,
    "FluxTransformer2DModel": _TEXT,
    "HunyuanDiT2DModel": (
        "cross_attention_dim", "cross_attention_dim_t5", "text_len", "text_len_t5",
        "use_style_cond_and_image_meta_size",
    ),
}  # fmt: skip
_SAME_OF_FEATURES = ("num_attention_heads", "attention_head_dim")
_ANY_PIXELS = (512, 1024)
"""Models of any size may shift the noise by the size: they are compared at two of them."""
_SAME_NUMBER = 1e-4


def check_same_task(ours: OpenModel, theirs: OpenModel, settings: MaskedDistillSettings) -> None:
    """Refuse a teacher to whom the same call means something else.

    Args:
        ours: the model that learns, with or without its weights.
        theirs: the teacher, the same.
        settings: of the stage; they name the teacher.

    Raises:
        PlanError: it is of another class or size, is conditioned on something else, predicts something
            else, or was trained on another schedule of noise.
        StageError: nothing is known of how one of them was trained.
    """
    _check_configs(ours.config, theirs.config, settings)
    for pixels in _ANY_PIXELS:
        contents = [task_for(one, shape=latent_shape(one.config, pixels)).content for one in (ours, theirs)]
        told = _difference(*contents)
        if told:
            own = "" if theirs.scheduler is not None else " (it comes without a scheduler: the usual one)"
            raise PlanError(
                f"{settings.method}.teacher: {settings.teacher} {told}{own}",
                hint="name a model that was trained on the same noise to predict the same",
            )


def _check_configs(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], settings: MaskedDistillSettings
) -> None:
    keys = (
        *_SAME,
        *_CONDITIONS.get(ours["_class_name"], ()),
        *(_SAME_OF_FEATURES if settings.features else ()),
    )
    different = [key for key in keys if ours.get(key) != theirs.get(key)]
    if not different and _told_sizes(ours) != _told_sizes(theirs):
        different = ["use_additional_conditions"]
    if different:
        key = different[0]
        raise PlanError(
            f"{settings.method}.teacher: {settings.teacher} has {key} {theirs.get(key)!r}, the model has"
            f" {ours.get(key)!r}",
            hint="write features: 0 to learn from predictions alone"
            if key in _SAME_OF_FEATURES
            else "name a model that sees and predicts the same",
        )


def _told_sizes(config: Mapping[str, Any]) -> bool:
    """Tell whether a PixArt is told the size of the images; its config may leave that to the size itself."""
    return config["_class_name"] == "PixArtTransformer2DModel" and uses_additional_conditions(config)


def _difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str | None:
    """Return in what two contents of `DiffusionTask` differ; None: in nothing."""
    predicted = [_predicted(content) for content in (ours, theirs)]
    if predicted[0] != predicted[1]:
        return f"predicts {predicted[1]}, the model {predicted[0]}"
    if ours[0] == "flow":
        names = ("", "shift of the noise", "number of timesteps")
        return next(
            (
                f"has another {name}: {theirs[at]:g}, the model {ours[at]:g}"
                for at, name in enumerate(names)
                if name and not isclose(ours[at], theirs[at], rel_tol=_SAME_NUMBER)
            ),
            None,
        )
    kept = ours[0], theirs[0]
    if len(kept[0]) != len(kept[1]):
        return f"was trained with {len(kept[1])} timesteps, the model with {len(kept[0])}"
    pairs = enumerate(zip(*kept, strict=True))
    apart = [place for place, (one, other) in pairs if not isclose(one, other, rel_tol=_SAME_NUMBER)]
    if apart:
        at = apart[-1]
        return (
            f"was trained on another schedule of noise: at timestep {at} {kept[1][at]:.3g} of the signal's"
            f" variance is left, of the model's {kept[0][at]:.3g}"
        )
    return None


def _predicted(content: Sequence[Any]) -> str:
    return "a flow" if content[0] == "flow" else str(content[1])
