"""What the config of Hunyuan-DiT may say (`HunyuanDiT2DModel`). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, MAX_WIDTH, check_flag, check_integer, check_number

CLASS_NAME = "HunyuanDiT2DModel"
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 88, "in_channels": None, "patch_size": None,
    "activation_fn": "gelu-approximate", "sample_size": 32, "hidden_size": 1152, "num_layers": 28,
    "mlp_ratio": 4.0, "learn_sigma": True, "cross_attention_dim": 1024, "norm_type": "layer_norm",
    "cross_attention_dim_t5": 2048, "pooled_projection_dim": 1024, "text_len": 77, "text_len_t5": 256,
    "use_style_cond_and_image_meta_size": True,
}  # fmt: skip
POOLER_HEADS = 8
"""Heads of the attention that makes one vector of the T5 text."""

_ACTIVATIONS = ("gelu", "gelu-approximate", "geglu")
_FLAGS = ("learn_sigma", "use_style_cond_and_image_meta_size")
_MAX_TOKENS = 2**18
_MAX_RATIO = 64.0
_ROPE = 4


def check_hunyuan(config: Mapping[str, Any], where: str) -> None:
    """Check the values of a config that has all keys.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    for key in DEFAULTS:
        _check_value(key, config[key], where)
    sample, patch = config["sample_size"], config["patch_size"]
    if sample % patch:
        raise SourceError(f"{where}: patch_size {patch} does not divide sample_size {sample}")
    if (sample // patch) ** 2 > _MAX_TOKENS:
        raise SourceError(
            f"{where}: sample_size {sample} makes {(sample // patch) ** 2} tokens; at most {_MAX_TOKENS}"
        )
    if config["num_layers"] % 2 and config["num_layers"] > 1:
        raise SourceError(
            f"{where}: num_layers {config['num_layers']} is odd: skips join the first half of the blocks to"
            " the second, and the stock class cannot run such a model"
        )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["hidden_size"] != width:
        raise SourceError(
            f"{where}: hidden_size {config['hidden_size']} is not num_attention_heads * attention_head_dim ="
            f" {width}"
        )
    for key, factor in (("attention_head_dim", _ROPE), ("cross_attention_dim_t5", POOLER_HEADS)):
        if config[key] % factor:
            raise SourceError(f"{where}: {key} {config[key]} is no multiple of {factor}")


def _check_value(key: str, value: Any, where: str) -> None:
    if key == "activation_fn":
        if value not in _ACTIVATIONS:
            raise SourceError(f"{where}: {key}: {value!r} is not supported; supported: {_ACTIVATIONS}")
    elif key == "norm_type":
        if value != DEFAULTS[key]:
            raise SourceError(f"{where}: {key}: {value!r} is not {DEFAULTS[key]!r}, which {CLASS_NAME} needs")
    elif key in _FLAGS:
        check_flag(key, value, where)
    elif key == "mlp_ratio":
        check_number(key, value, 1e-3, _MAX_RATIO, where)
    else:
        check_integer(key, value, MAX_LAYERS if key == "num_layers" else MAX_WIDTH, where)
