"""What the config of a Segment Anything model may say, and what follows from it. Torch-free.

As for the other models of transformers, a config is kept as it stands. It has a part for the image encoder,
one for the prompt encoder and one for the mask decoder; files of older releases repeat in each all keys that
any model may have. What decides shapes is read here and held against limits, because a config is untrusted
input, and the three parts must fit together: stock code would build them, and fail in the first forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError
from .config_values import (
    MAX_LAYERS,
    MAX_WIDTH,
    check_flag,
    check_integer,
    check_number,
    check_shared_keys,
    is_integer,
)
from .language_config import structural_arguments
from .sam_sizes import LAYER_DOWNSAMPLE_RATE, PARTS, SAM_CLASSES, SamEncoder, part_of, sam_encoder

MAX_SIDE = 2**14  # pixels of an image
MAX_TOKENS = 2**18
MAX_CHANNELS = 2**12
MAX_MASKS = 2**10
MAX_NUMBER = 2.0**40
POINT_KINDS = 4
"""Embeddings of prompts: off the object, on it, first and second corner of a box."""

POSITIONS = "shared_image_embedding.positional_embedding"
POSITIONS_COPY = "prompt_encoder.shared_embedding.positional_embedding"

_LIMITS: Mapping[str, int] = {
    "image_size": MAX_SIDE, "patch_size": MAX_SIDE, "num_channels": MAX_CHANNELS,
    "num_hidden_layers": MAX_LAYERS, "iou_head_depth": MAX_LAYERS, "num_multimask_outputs": MAX_MASKS,
    "num_point_embeddings": MAX_MASKS,
}  # fmt: skip
_SPECIAL = frozenset({"mlp_ratio", "window_size", "global_attn_indexes"})


def complete_sam_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    check_shared_keys(config, SAM_CLASSES[class_name], MAX_NUMBER, where)
    check_flag("tie_word_embeddings", config.get("tie_word_embeddings", True), where)
    for key in PARTS:
        given = config.get(key)
        if not isinstance(given, dict | None):
            raise SourceError(f"{where}: {key}: {type(given).__name__} is not a mapping")
        _check_part(key, config, where)
    _check_encoder(sam_encoder(config), where)
    _check_decoder(part_of(config, "mask_decoder_config"), where)
    _check_together(config, where)
    return {**config, "_class_name": class_name}


def check_sam_config(class_name: str, config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a config that its checkpoint cannot belong to, before anything of its sizes is built.

    Args:
        class_name: of the config.
        config: config.json of a folder.
        tensors: how many the folder stores.
        where: for the message.

    Raises:
        SourceError: naming the first value that is wrong.
    """
    full = complete_sam_config(class_name, config, where)
    decoder = part_of(full, "mask_decoder_config")
    modules = {
        "vision_config.num_hidden_layers": sam_encoder(full).layers,
        "mask_decoder_config.num_hidden_layers": decoder["num_hidden_layers"],
        "mask_decoder_config.iou_head_depth": decoder["iou_head_depth"],
        "mask_decoder_config.num_multimask_outputs": decoder["num_multimask_outputs"],
    }
    for key, count in modules.items():
        if count > tensors:
            raise SourceError(f"{where}: {key} {count} with only {tensors} stored tensors")


def sam_copies(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the one tensor that is a copy, unless the config says that it is none: copy -> stored name."""
    return {POSITIONS_COPY: POSITIONS} if config.get("tie_word_embeddings", True) else {}


def sam_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stock config class may be given; nothing that makes it fetch or run other code."""
    parts = {key: structural_arguments(config[key]) for key in PARTS if isinstance(config.get(key), dict)}
    for part in parts.values():
        part.pop("model_type", None)  # the stock class knows what a part is; older files name none
    return {**structural_arguments(config), **parts}


def _check_part(part: str, config: Mapping[str, Any], where: str) -> None:
    """Hold every value that decides shapes against its limit."""
    inside = f"{where}: {part}"
    for key, value in part_of(config, part).items():
        default = PARTS[part][key]
        if isinstance(default, bool):
            check_flag(key, value, inside)
        elif default is None or key in _SPECIAL:
            _check_special(key, value, inside)
        else:
            check_integer(key, value, _LIMITS.get(key, MAX_WIDTH), inside)
    given = config.get(part) or {}
    for key in ("layer_norm_eps", "attention_dropout"):
        if key in given:
            check_number(key, given[key], 0.0, 1.0, inside)


def _check_special(key: str, value: Any, inside: str) -> None:
    if key == "mlp_ratio":
        check_number(key, value, 0.0, 1024.0, inside)
    elif key == "mlp_dim" and value is not None:
        check_integer(key, value, MAX_WIDTH, inside)
    elif key == "window_size" and not is_integer(value, 0, MAX_SIDE):
        raise SourceError(f"{inside}: {key}: {value!r} is not an integer from 0 to {MAX_SIDE}")
    elif key == "global_attn_indexes" and not (
        isinstance(value, list | tuple) and all(is_integer(index, 0, MAX_LAYERS) for index in value)
    ):
        raise SourceError(f"{inside}: {key}: {value!r} is not a list of the indices of layers")


def _check_encoder(encoder: SamEncoder, where: str) -> None:
    inside = f"{where}: vision_config"
    if encoder.width % encoder.heads:
        raise SourceError(
            f"{inside}: num_attention_heads {encoder.heads} does not divide hidden_size {encoder.width}"
        )
    if not 1 <= encoder.inner <= MAX_WIDTH:
        raise SourceError(
            f"{inside}: mlp_ratio makes {encoder.inner} inner channels; 1 to {MAX_WIDTH} are supported"
        )
    tokens = max(encoder.side, encoder.padded_side) ** 2
    if encoder.side < 1 or tokens > MAX_TOKENS:
        raise SourceError(
            f"{inside}: image_size {encoder.image_size}, patch_size {encoder.patch} and window_size"
            f" {encoder.window} make {tokens} tokens; 1 to {MAX_TOKENS} are supported"
        )


def _check_decoder(decoder: Mapping[str, Any], where: str) -> None:
    inside = f"{where}: mask_decoder_config"
    width, heads = decoder["hidden_size"], decoder["num_attention_heads"]
    if width < 8:
        raise SourceError(f"{inside}: hidden_size {width}: an eighth of it makes masks")
    rates = (1, LAYER_DOWNSAMPLE_RATE, decoder["attention_downsample_rate"])
    for channels in (width // rate for rate in rates):
        if channels < 1 or channels % heads:
            raise SourceError(f"{inside}: num_attention_heads {heads} does not divide {channels} channels")


def _check_together(config: Mapping[str, Any], where: str) -> None:
    """Hold the parts against each other; the stock class finds out in its first forward."""
    vision, prompt, decoder = (part_of(config, key) for key in PARTS)
    for key, value in (
        ("vision_config: output_channels", vision["output_channels"]),
        ("vision_config: twice num_pos_feats", 2 * vision["num_pos_feats"]),
        ("mask_decoder_config: hidden_size", decoder["hidden_size"]),
    ):
        if value != prompt["hidden_size"]:
            raise SourceError(
                f"{where}: {key} {value} is not the hidden_size {prompt['hidden_size']} of"
                " prompt_encoder_config"
            )
    for key in ("image_size", "patch_size"):
        if vision[key] != prompt[key]:
            raise SourceError(
                f"{where}: {key} {vision[key]} of vision_config is not the {prompt[key]} of"
                " prompt_encoder_config"
            )
    side = vision["image_size"] // vision["patch_size"]
    stated = (config.get("prompt_encoder_config") or {}).get("image_embedding_size", side)
    if type(stated) is not int or stated != side:  # stock code would go by it, and make a grid of that size
        raise SourceError(
            f"{where}: prompt_encoder_config: image_embedding_size {stated!r} is not the {side} patches of a"
            " side"
        )
    if prompt["mask_input_channels"] % 4:
        raise SourceError(
            f"{where}: prompt_encoder_config: mask_input_channels {prompt['mask_input_channels']} is no"
            " multiple of 4"
        )
    if prompt["num_point_embeddings"] < POINT_KINDS:
        raise SourceError(
            f"{where}: prompt_encoder_config: num_point_embeddings {prompt['num_point_embeddings']};"
            f" points and boxes need {POINT_KINDS}"
        )
