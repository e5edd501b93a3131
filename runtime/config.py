"""What a model's config may say: the stock classes' defaults, and limits on every value. Torch-free.

A config is untrusted input. The stock classes compute tables from its numbers while they are built,
so a number that is too large must be refused before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import SourceError
from . import config_flux, config_hunyuan, config_unet
from .config_values import (
    MAX_LAYERS,
    MAX_WIDTH,
    check_flag,
    check_integer,
    check_number,
    check_numbers,
    is_integer,
)
from .language_config import class_name_of
from .transformers_config import complete_transformers_config, is_transformers_class

MAX_TOKENS = 2**18
SPARE_TABLE_BYTES = 16 * 2**20

_DIT_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
    "num_layers": 28, "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": 32,
    "patch_size": 2, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000,
    "upcast_attention": False, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}  # fmt: skip
_PIXART_DEFAULTS: dict[str, Any] = {
    **_DIT_DEFAULTS, "out_channels": 8, "cross_attention_dim": 1152, "sample_size": 128,
    "norm_type": "ada_norm_single", "norm_eps": 1e-6, "interpolation_scale": None,
    "use_additional_conditions": None, "caption_channels": None, "attention_type": "default",
}  # fmt: skip
_SD3_DEFAULTS: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64,
    "num_attention_heads": 18, "joint_attention_dim": 4096, "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 96,
    "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DiTTransformer2DModel": _DIT_DEFAULTS,
    "PixArtTransformer2DModel": _PIXART_DEFAULTS,
    "SD3Transformer2DModel": _SD3_DEFAULTS,
    config_unet.CLASS_NAME: config_unet.DEFAULTS,
    config_flux.CLASS_NAME: config_flux.DEFAULTS,
    config_hunyuan.CLASS_NAME: config_hunyuan.DEFAULTS,
}
_CHECKS: Mapping[str, Callable[[Mapping[str, Any], str], None]] = {
    config_unet.CLASS_NAME: config_unet.check_unet,
    config_flux.CLASS_NAME: config_flux.check_flux,
    config_hunyuan.CLASS_NAME: config_hunyuan.check_hunyuan,
}
_TUPLES = ("dual_attention_layers", "axes_dims_rope")
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu", "gelu-approximate", "geglu"),
    "attention_type": ("default",),
    "qk_norm": (None, "rms_norm"),
}
_OPTIONAL_WIDTHS = ("out_channels", "cross_attention_dim", "caption_channels")


def complete_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config's values and fill in the stock class's defaults.

    Keys that the stock class does not take (left over from older library versions) are dropped, as
    the stock class does.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    if is_transformers_class(class_name):
        return complete_transformers_config(class_name, config, where)
    defaults = DEFAULTS[class_name]
    full = {key: config.get(key, default) for key, default in defaults.items()}
    if class_name in _CHECKS:
        _CHECKS[class_name](full, where)
    else:
        for key, value in full.items():
            _check_value(class_name, key, value, where)
        _check_relations(class_name, full, where)
    for key in _TUPLES:
        if isinstance(full.get(key), list):
            full[key] = tuple(full[key])
    kept = {key: config[key] for key in ("_diffusers_version",) if key in config}
    return {"_class_name": class_name, **kept, **full}


def check_config(config: Mapping[str, Any], stored_bytes: int, where: str, *, tensors: int) -> None:
    """Refuse a config that would make its class allocate or build more than its checkpoint can need.

    Args:
        config: of any class; the values of the known ones are checked as by `complete_config`.
        stored_bytes: of all tensors of the checkpoint.
        where: for the message.
        tensors: how many the checkpoint stores.

    Raises:
        SourceError: naming `where` and the first value that is wrong.
    """
    for key, value in config.items():
        if key != "quantization_config":
            check_numbers(key, value, MAX_WIDTH, where)
    for key in ("num_layers", "num_single_layers"):
        layers = config.get(key)
        if type(layers) is int and layers > tensors:
            raise SourceError(f"{where}: {key} {layers} with only {tensors} stored tensors")
    class_name = str(class_name_of(config))
    if class_name in DEFAULTS:
        full = complete_config(class_name, config, where)
        if class_name == config_unet.CLASS_NAME and config_unet.layer_count(full) > tensors:
            raise SourceError(
                f"{where}: layers_per_block and transformer_layers_per_block make"
                f" {config_unet.layer_count(full)} layers, with only {tensors} stored tensors"
            )
        has_table = "patch_size" in full and class_name not in _CHECKS
        table = 4 * _positions(full) * model_width(full) if has_table else 0
        if table > stored_bytes + SPARE_TABLE_BYTES:
            raise SourceError(
                f"{where}: sample_size {full['sample_size']} gives a table of {table} bytes for positions, "
                f"but the weights have only {stored_bytes}",
                hint="the config was changed by hand, or belongs to other weights",
            )
        return
    sample, patch = config.get("sample_size"), config.get("patch_size")
    if type(sample) is int and type(patch) is int and patch > 0 and (sample // patch) ** 2 > MAX_TOKENS:
        raise SourceError(
            f"{where}: sample_size {sample} makes {(sample // patch) ** 2} tokens; at most {MAX_TOKENS}"
        )


def _check_value(class_name: str, key: str, value: Any, where: str) -> None:
    default = DEFAULTS[class_name][key]
    if key in _ALLOWED:
        if value not in _ALLOWED[key]:
            raise SourceError(f"{where}: {key}: {value!r} is not supported; supported: {_ALLOWED[key]}")
    elif key == "norm_type":
        if value != default:
            raise SourceError(f"{where}: norm_type: {value!r} is not {default!r}, which {class_name} needs")
    elif key == "dual_attention_layers":
        if not isinstance(value, list | tuple) or not all(is_integer(item, 0, MAX_LAYERS) for item in value):
            raise SourceError(f"{where}: {key}: {value!r} is not a list of block indices")
    elif isinstance(default, bool) or key == "use_additional_conditions":
        if value is not None or default is not None:
            check_flag(key, value, where)
    elif isinstance(default, int) or key in _OPTIONAL_WIDTHS:
        _check_width(key, value, where)
    else:
        _check_float(default, key, value, where)


def _check_width(key: str, value: Any, where: str) -> None:
    if value is None and key in _OPTIONAL_WIDTHS:
        return
    limit = MAX_LAYERS if key == "num_layers" else MAX_WIDTH
    check_integer(key, value, limit, where)


def _check_float(default: Any, key: str, value: Any, where: str) -> None:
    if isinstance(default, float):  # shares of dropout, and what norms add
        check_number(key, value, 0.0, 1.0, where)
    elif key == "interpolation_scale" and value is not None:
        check_number(key, value, 1e-3, 1e3, where)


def _positions(config: Mapping[str, Any]) -> int:
    side = max(config["sample_size"] // config["patch_size"], config.get("pos_embed_max_size", 1))
    return int(side * side)


def _check_relations(class_name: str, config: Mapping[str, Any], where: str) -> None:
    sample, patch = config["sample_size"], config["patch_size"]
    if sample % patch:
        raise SourceError(f"{where}: patch_size {patch} does not divide sample_size {sample}")
    tokens = _positions(config)
    if tokens > MAX_TOKENS:
        raise SourceError(f"{where}: sample_size {sample} makes {tokens} tokens; at most {MAX_TOKENS}")
    width = model_width(config)
    if width > MAX_WIDTH:
        raise SourceError(f"{where}: num_attention_heads * attention_head_dim = {width}; at most {MAX_WIDTH}")
    if class_name == "SD3Transformer2DModel" and config["caption_projection_dim"] != width:
        raise SourceError(
            f"{where}: caption_projection_dim {config['caption_projection_dim']} is not the width {width}"
        )


def model_width(config: Mapping[str, Any]) -> int:
    """Return the channels of a token."""
    return int(config["num_attention_heads"] * config["attention_head_dim"])
