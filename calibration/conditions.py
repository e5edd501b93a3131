"""What samples are drawn for: class labels, or embeddings of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..models.latent_sizes import PIXELS_PER_LATENT, any_size
from ..models.pixart import size_conditions
from ..models.shapes import uses_additional_conditions
from ..models.unet import time_ids
from ..models.unet_shapes import text_vector_width
from ..runtime.config_unet import TIME_IDS, per_stage
from .prompts import ADDED, encode, read_prompts
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

_POOLED = f"{ADDED}/text_embeds"

# Argument of the denoiser (a slash leads into a nested one) -> key in an embeddings file (the negative ones
# have `negative_` before it).
EMBEDDING_KEYS: Mapping[str, Mapping[str, str]] = {
    "pixart": {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"},
    "sd3": {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    "unet": {"encoder_hidden_states": "prompt_embeds", _POOLED: "pooled_prompt_embeds"},
    "flux": {"encoder_hidden_states": "prompt_embeds", "pooled_projections": "pooled_prompt_embeds"},
    "hunyuan": {
        "encoder_hidden_states": "prompt_embeds",
        "text_embedding_mask": "prompt_attention_mask",
        "encoder_hidden_states_t5": "prompt_embeds_2",
        "text_embedding_mask_t5": "prompt_attention_mask_2",
    },
}

_KEYS = {argument: key for keys in EMBEDDING_KEYS.values() for argument, key in keys.items()}
_NEGATIVE_HINT = (
    "add it to the file of calibration.embeddings, or set guidance_scale to 1, in calibration, in its data"
    " and in evaluate.fidelity"
)

Sizes = Callable[[int], Mapping[str, Tensor]]
"""From a number of rows to the entries of `added_cond_kwargs` that tell the size of the images."""


class Conditions(Protocol):
    """Conditions of n samples."""

    def __len__(self) -> int:
        """Return n."""

    def inputs(self, start: int, stop: int, *, guided: bool) -> dict[str, Any]:
        """Return the denoiser's arguments for samples `start : stop`, on the CPU.

        Guided: twice as many rows, the conditional half first, as the stock DiT pipeline.
        """


@dataclass(frozen=True)
class ClassConditions:
    """Class labels.

    Attributes:
        labels: [n] int64.
        null: the label that means "no class".
    """

    labels: Tensor
    null: int

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.labels)

    def inputs(self, start: int, stop: int, *, guided: bool) -> dict[str, Any]:
        """Return `class_labels`."""
        labels = self.labels[start:stop]
        return {"class_labels": torch.cat([labels, torch.full_like(labels, self.null)]) if guided else labels}


@dataclass(frozen=True)
class PromptConditions:
    """Prompt embeddings.

    Attributes:
        positive: argument of the denoiser -> [prompts, ...]; a slash leads into a nested argument.
        negative: the same for the empty prompt, [1 or prompts, ...]; empty where it is not known.
        index: [n] int64, the prompt of each sample.
        sizes: for models that are told the size of the images (PixArt-alpha, SDXL); None for others.
        guidance: for models that are told how strong guidance is (see `embeds_guidance`); None for others.
        pixels: side of the images that are drawn, of models of any size; None: the usual one.
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor]
    index: Tensor
    sizes: Sizes | None = None
    guidance: float | None = None
    pixels: int | None = None

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.index)

    def inputs(self, start: int, stop: int, *, guided: bool) -> dict[str, Any]:
        """Return the prompt's arguments.

        Raises:
            SourceError: guided, and there are no negative embeddings.
        """
        rows = self.index[start:stop]
        inputs: dict[str, Any] = {}
        for name, values in self.positive.items():
            taken = values[rows]
            outer, _, inner = name.rpartition("/")
            target = inputs.setdefault(outer, {}) if outer else inputs
            target[inner] = torch.cat([taken, self._negative(name, rows)]) if guided else taken
        count = len(rows) * (2 if guided else 1)
        if self.sizes is not None:
            inputs.setdefault(ADDED, {}).update(self.sizes(count))
        if self.guidance is not None:
            inputs["guidance"] = torch.full((count,), self.guidance)
        return inputs

    def _negative(self, name: str, rows: Tensor) -> Tensor:
        values = self.negative.get(name)
        if values is None:
            raise SourceError(
                f"the prompt embeddings have no tensor negative_{_KEYS[name]}, which guidance needs",
                hint=_NEGATIVE_HINT,
            )
        return values.expand(len(rows), *values.shape[1:]) if len(values) == 1 else values[rows]


def conditions_for(model: OpenModel, settings: CalibrationSettings, samples: int, seed: int) -> Conditions:
    """Choose the conditions of `samples` samples.

    Classes and prompts that the settings name are taken in turn; without any, all classes of the
    model are, in an order that `seed` decides.

    Raises:
        SourceError: a text-conditional model and nothing to condition on, a class that the model does
            not have, or prompts or embeddings that cannot be read.
    """
    if model.family.name == "dit":
        return _class_conditions(model, settings, samples, seed)
    return _prompt_conditions(model, settings, samples)


def _class_conditions(
    model: OpenModel, settings: CalibrationSettings, samples: int, seed: int
) -> ClassConditions:
    count = int(model.config["num_embeds_ada_norm"])
    if settings.prompts is not None or settings.embeddings is not None:
        raise SourceError(
            f"{model.source.id}: is conditioned on classes, not on prompts", hint="use calibration.classes"
        )
    if settings.classes:
        wrong = [label for label in settings.classes if label >= count]
        if wrong:
            raise SourceError(
                f"calibration.classes: {wrong[0]} is not a class; the model has 0 to {count - 1}"
            )
        order = torch.tensor(settings.classes, dtype=torch.int64)
    else:
        order = torch.randperm(count, generator=generator_for(seed, "classes"))
    return ClassConditions(order[torch.arange(samples) % len(order)], null=count)


def _prompt_conditions(model: OpenModel, settings: CalibrationSettings, samples: int) -> PromptConditions:
    if settings.classes is not None:
        raise SourceError(
            f"{model.source.id}: is conditioned on prompts, not on classes", hint="use calibration.prompts"
        )
    if settings.embeddings is not None:
        positive, negative = read_embeddings(Path(settings.embeddings), model)
    elif settings.prompts is not None:
        positive, negative = encode(model, read_prompts(Path(settings.prompts)))
    else:
        raise SourceError(
            f"{model.source.id}: needs prompts to sample from",
            hint="set calibration.prompts (a text file, one prompt per line; the model then needs its "
            "text encoders beside it) or calibration.embeddings (safetensors with prompt_embeds, ...)",
        )
    check_widths(model, {name: tuple(values.shape) for name, values in positive.items()})
    prompts = len(next(iter(positive.values())))
    return prompt_conditions(model, settings, positive, negative, torch.arange(samples) % prompts)


def prompt_conditions(
    model: OpenModel,
    settings: CalibrationSettings,
    positive: Mapping[str, Tensor],
    negative: Mapping[str, Tensor],
    index: Tensor,
) -> PromptConditions:
    """Return prompts as conditions, with what the model is told beside them.

    Args:
        model: the denoiser.
        settings: say how strong guidance is, and how large the images are.
        positive, negative, index: see `PromptConditions`.
    """
    return PromptConditions(
        positive, negative, index, size_entries(model), told_guidance(model, settings.guidance_scale),
        settings.size,
    )  # fmt: skip


def embeds_guidance(model: OpenModel) -> bool:
    """Tell whether a model is told how strong guidance is, and needs no second half for it."""
    return bool(model.config.get("guidance_embeds"))


def told_guidance(model: OpenModel, scale: float) -> float | None:
    """Return what a model is told of guidance; None of one that is not told."""
    return scale if embeds_guidance(model) else None


def is_guided(model: OpenModel, scale: float) -> bool:
    """Tell whether a call has two rows per sample, with and without the condition."""
    return scale > 1 and not embeds_guidance(model)


def size_entries(model: OpenModel) -> Sizes | None:
    """Return what tells a model the size of its images in `ADDED`; None of one that is not told there."""
    if any_size(model.config):
        return None
    pixels = int(model.config["sample_size"]) * PIXELS_PER_LATENT  # PixArt's autoencoder as well
    if model.family.name == "pixart" and uses_additional_conditions(model.config):
        return partial(size_conditions, pixels, like=torch.empty(0))
    if model.family.name == "unet" and model.config["addition_embed_type"] is not None:
        return lambda rows: {"time_ids": time_ids(pixels, rows)}
    return None


def check_widths(model: OpenModel, shapes: Mapping[str, tuple[int, ...]], place: Path | None = None) -> None:
    """Hold the shapes of embeddings against those that the config of the model implies.

    Args:
        model: the denoiser.
        shapes: argument of the denoiser -> (prompts, ...).
        place: the file that they are in; None: they are in none.

    Raises:
        SourceError: naming the first that does not fit.
    """
    for name, shape in _shapes(model, shapes).items():
        given = shapes[name][1:] if name in shapes else shape
        fits = len(given) == len(shape) and all(
            want in (None, have) for have, want in zip(given, shape, strict=True)
        )
        if not fits:
            key = EMBEDDING_KEYS[model.family.name][name]
            where = f"{model.source.id}: reads" if place is None else f"{place}: {model.source.id} reads"
            wanted, found = _told(key, shape, given), _told(key, given, shape)
            raise SourceError(
                f"{where} {key} of {wanted}, and these have {found}",
                hint="the text encoders are of another model, or this one is told other things than sizes",
            )


def _told(key: str, shape: tuple[int | None, ...], other: tuple[int | None, ...]) -> str:
    """Return a shape as the message about another one has it: the width alone where that is enough."""
    if len(shape) == len(other) and (None in (*shape[:-1], *other[:-1]) or len(shape) == 1):
        return f"{shape[-1]} {'values' if 'mask' in key else 'channels'}"
    return " x ".join("any" if length is None else str(length) for length in shape) or "no dimension"


def _shapes(model: OpenModel, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
    """Return argument -> shape of a prompt's embedding, None where any length will do."""
    config = model.config
    if model.family.name == "pixart":
        states = given.get("encoder_hidden_states", ())
        return {
            "encoder_hidden_states": (None, config["caption_channels"] or config["cross_attention_dim"]),
            "encoder_attention_mask": (states[1] if len(states) == 3 else None,),
        }
    if model.family.name == "unet":
        return {
            "encoder_hidden_states": (None, per_stage(config, "cross_attention_dim")[0]),
            _POOLED: (text_vector_width(config, TIME_IDS) if config["addition_embed_type"] else None,),
        }
    if model.family.name in ("sd3", "flux"):
        return {
            "encoder_hidden_states": (None, config["joint_attention_dim"]),
            "pooled_projections": (config["pooled_projection_dim"],),
        }
    if model.family.name == "hunyuan":
        first, second = config["text_len"], config["text_len_t5"]
        return {
            "encoder_hidden_states": (first, config["cross_attention_dim"]),
            "text_embedding_mask": (first,),
            "encoder_hidden_states_t5": (second, config["cross_attention_dim_t5"]),
            "text_embedding_mask_t5": (second,),
        }
    return {}


def embedding_keys(model: OpenModel) -> dict[str, str]:
    """Return argument of the denoiser (see `EMBEDDING_KEYS`) -> key in an embeddings file."""
    keys = dict(EMBEDDING_KEYS[model.family.name])
    if model.family.name == "unet" and model.config["addition_embed_type"] is None:
        del keys[_POOLED]
    return keys


def read_embeddings(path: Path, model: OpenModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read prompt embeddings and, where the file has them, negative ones.

    Args:
        path: safetensors file; keys as the stock pipelines' `encode_prompt` names its results.
        model: decides which keys are needed.

    Returns:
        (positive, negative): argument of the denoiser -> [prompts, ...].

    Raises:
        SourceError: not readable, a key is missing, or the numbers of prompts differ.
    """
    keys = embedding_keys(model)
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            missing = [key for key in keys.values() if key not in names]
            if missing:
                raise SourceError(
                    f"{path}: no tensor {missing[0]!r}", hint=f"needed: {', '.join(keys.values())}"
                )
            positive = {argument: file.get_tensor(key) for argument, key in keys.items()}
            negative = {
                argument: file.get_tensor(f"negative_{key}")
                for argument, key in keys.items()
                if f"negative_{key}" in names
            }
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: cannot be read as safetensors: {error}") from None
    if len({len(tensor) for tensor in positive.values()}) != 1:
        raise SourceError(f"{path}: the tensors hold different numbers of prompts")
    return positive, negative
