"""What the config of Flux's denoiser may say (`FluxTransformer2DModel`). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, MAX_WIDTH, check_flag, check_integer, is_integer

CLASS_NAME = "FluxTransformer2DModel"
DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": False, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
PACKED = 4
"""Pixels of a latent that make a token: two by two."""

_AXES = 3


def check_flux(config: Mapping[str, Any], where: str) -> None:
    """Check the values of a config that has all keys.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    for key in DEFAULTS:
        _check_value(key, config[key], where)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if width > MAX_WIDTH:
        raise SourceError(f"{where}: num_attention_heads * attention_head_dim = {width}; at most {MAX_WIDTH}")
    if sum(config["axes_dims_rope"]) != config["attention_head_dim"]:
        raise SourceError(
            f"{where}: axes_dims_rope {list(config['axes_dims_rope'])} does not add up to attention_head_dim"
            f" {config['attention_head_dim']}"
        )
    if config["in_channels"] % PACKED:
        raise SourceError(
            f"{where}: in_channels {config['in_channels']} is no multiple of {PACKED}: a token is"
            f" {PACKED} pixels of a latent"
        )
    if config["out_channels"] not in (None, config["in_channels"]):
        raise SourceError(
            f"{where}: out_channels {config['out_channels']} is not in_channels {config['in_channels']}:"
            " models that are given more than what they denoise are not supported"
        )


def _check_value(key: str, value: Any, where: str) -> None:
    if key == "guidance_embeds":
        check_flag(key, value, where)
    elif key == "axes_dims_rope":
        even = isinstance(value, list | tuple) and all(
            is_integer(item, 2, MAX_WIDTH) and item % 2 == 0 for item in value
        )
        if not even or len(value) != _AXES:
            raise SourceError(f"{where}: {key}: {value!r} is not a list of {_AXES} even numbers")
    elif key == "patch_size":
        if value != 1 or isinstance(value, bool):
            raise SourceError(f"{where}: {key}: {value!r} is not supported; supported: 1")
    elif key == "num_single_layers":
        if not is_integer(value, 0, MAX_LAYERS):
            raise SourceError(f"{where}: {key}: {value!r} is not an integer from 0 to {MAX_LAYERS}")
    elif not (key == "out_channels" and value is None):
        check_integer(key, value, MAX_LAYERS if key == "num_layers" else MAX_WIDTH, where)
