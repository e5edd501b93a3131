"""Prompts to embeddings, by the text encoders that a pipeline folder brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..models.checkpoint import PIPELINE_NAME, read_json
from ..models.hub import OTHER_VARIANTS, fetch

ADDED = "added_cond_kwargs"
"""Argument of a U-Net that nests what SDXL conditions on besides the text."""

_PIPELINE_FILES = ("model_index.json", "tokenizer*/*", "text_encoder*/*.json", "text_encoder*/*.safetensors")
_ENCODING_PARTS = ("tokenizer", "text_encoder")
_CHUNK = 8


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines do not count.

    Raises:
        SourceError: not readable, or no prompt in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise SourceError(f"{path}: holds no prompt", hint="write one prompt per line")
    return prompts


@torch.no_grad()
def encode(model: OpenModel, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encode prompts, and the empty prompt, with the stock pipeline of the checkpoint.

    Only tokenizers and text encoders are loaded, and they are dropped again before this returns.

    Returns:
        (positive, negative): argument of the denoiser -> [prompts, ...] and [1, ...], on the CPU.

    Raises:
        SourceError: the checkpoint has no text encoders beside it.
        HubError: they could not be fetched.
    """
    pipeline = _text_pipeline(model)
    device = next(model.module.parameters()).device
    encoder = _ENCODERS[model.family.name]
    rows = [
        encoder(pipeline.to(device), prompts[i : i + _CHUNK], device) for i in range(0, len(prompts), _CHUNK)
    ]
    positive = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return positive, encoder(pipeline, [""], device)


def _encode_pixart(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=device)
    return {"encoder_hidden_states": embeds.cpu(), "encoder_attention_mask": mask.cpu()}


def _encode_sd3(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, device=device
    )
    return {"encoder_hidden_states": embeds.cpu(), "pooled_projections": pooled.cpu()}


def _encode_unet(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Encode for Stable Diffusion 1.x and 2.x (one text encoder) or XL (two, and a pooled text)."""
    if "text_encoder_2" not in pipeline.components:
        embeds, _ = pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": embeds.cpu()}
    # The pipeline knows what its empty prompt is: SDXL was trained with zeros in its place.
    empty = prompts == [""]
    results = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=empty)
    embeds, pooled = results[1::2] if empty else results[::2]
    return {"encoder_hidden_states": embeds.cpu(), f"{ADDED}/text_embeds": pooled.cpu()}


def _encode_flux(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=device)
    return {"encoder_hidden_states": embeds.cpu(), "pooled_projections": pooled.cpu()}


def _encode_hunyuan(pipeline: Any, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
    """Encode with both text encoders, the second of which is T5."""
    found: dict[str, Tensor] = {}
    for index, suffix in enumerate(("", "_t5")):
        embeds, _, mask, _ = pipeline.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, text_encoder_index=index
        )
        found[f"encoder_hidden_states{suffix}"] = embeds.cpu()
        found[f"text_embedding_mask{suffix}"] = mask.cpu()
    return found


_ENCODERS = {
    "pixart": _encode_pixart,
    "sd3": _encode_sd3,
    "unet": _encode_unet,
    "flux": _encode_flux,
    "hunyuan": _encode_hunyuan,
}


def _text_pipeline(model: OpenModel) -> Any:
    """Load the checkpoint's pipeline with nothing but what encodes text."""
    import diffusers

    folder = _pipeline_folder(model)
    index = read_json(folder / PIPELINE_NAME)
    parts = {name: value for name, value in index.items() if isinstance(value, list)}
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    usable = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    if not usable:
        raise SourceError(
            f"{folder / PIPELINE_NAME}: {index.get('_class_name')!r} is not a pipeline of diffusers"
        )
    for name in parts:
        if name.startswith(_ENCODING_PARTS) and parts[name][0] and not (folder / name).is_dir():
            raise SourceError(f"{folder / name}: missing; prompts cannot be encoded", hint=_EMBEDDINGS_HINT)
    others = {name: None for name in parts if not name.startswith(_ENCODING_PARTS)}
    try:
        return kind.from_pretrained(folder, **others, torch_dtype=model.spec.dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(
            f"{folder}: its text encoders cannot be loaded: {reason}", hint=_EMBEDDINGS_HINT
        ) from None


_EMBEDDINGS_HINT = "or set calibration.embeddings to a safetensors file with prompt_embeds, ..."


def _pipeline_folder(model: OpenModel) -> Path:
    if model.source.revision is not None:
        return fetch(model.source.id, model.source.revision, _PIPELINE_FILES, OTHER_VARIANTS)
    for folder in (model.source.folder, model.source.folder.parent):
        if (folder / PIPELINE_NAME).is_file():
            return folder
    raise SourceError(
        f"{model.source.folder}: no {PIPELINE_NAME} and so no text encoders to encode prompts with",
        hint=f"give the whole pipeline folder, {_EMBEDDINGS_HINT}",
    )
