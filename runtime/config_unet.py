"""What the config of a `UNet2DConditionModel` may say: Stable Diffusion 1.x, 2.x, XL and their kin.

The stock class builds far more kinds of U-Net than these. A key that asks for one of them is refused by
its name, because the layers that it adds would be neither counted nor calibrated. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, check_flag, check_integer, is_integer

CLASS_NAME = "UNet2DConditionModel"
TIME_IDS = 6
"""Numbers by which SDXL is told sizes: (height, width) of the original, the crop's corner, the image."""

_DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID = "UNetMidBlock2DCrossAttn"

DEFAULTS: Mapping[str, Any] = {
    "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False,
    "flip_sin_to_cos": True, "freq_shift": 0, "down_block_types": (*[_DOWN[0]] * 3, _DOWN[1]),
    "mid_block_type": _MID, "up_block_types": (_UP[1], *[_UP[0]] * 3), "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5,
    "cross_attention_dim": 1280, "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "attention_head_dim": 8, "num_attention_heads": None, "dual_cross_attention": False,
    "use_linear_projection": False, "class_embed_type": None, "addition_embed_type": None,
    "addition_time_embed_dim": None, "num_class_embeds": None, "upcast_attention": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None, "attention_type": "default",
    "class_embeddings_concat": False, "mid_block_only_cross_attention": None, "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}  # fmt: skip

_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "mid_block_type": (_MID, None),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "mid_block_only_cross_attention": (None, False),
    "upcast_attention": (None, False, True),
    "downsample_padding": (0, 1),
    **{
        key: (DEFAULTS[key],)
        for key in (
            "only_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type", "num_attention_heads",
            "dual_cross_attention", "class_embed_type", "num_class_embeds", "resnet_time_scale_shift",
            "resnet_skip_time_act", "resnet_out_scale_factor", "time_embedding_type", "time_embedding_act_fn",
            "timestep_post_act", "time_cond_proj_dim", "attention_type", "class_embeddings_concat",
            "cross_attention_norm",
        )
    },
}  # fmt: skip
_FLAGS = ("center_input_sample", "flip_sin_to_cos", "use_linear_projection")
_NUMBERS = ("freq_shift", "mid_block_scale_factor", "dropout", "norm_eps")
_OPTIONAL = ("time_embedding_dim", "addition_time_embed_dim", "projection_class_embeddings_input_dim")

_MAX_WIDTH = 2**16
_MAX_SIDE = 2**12
_MAX_KERNEL = 31
_MAX_STAGES = 16
_INTEGERS: Mapping[str, int] = {
    "sample_size": _MAX_SIDE, "in_channels": _MAX_WIDTH, "out_channels": _MAX_WIDTH,
    "norm_num_groups": _MAX_WIDTH, "conv_in_kernel": _MAX_KERNEL, "conv_out_kernel": _MAX_KERNEL,
    "addition_embed_type_num_heads": _MAX_WIDTH, **dict.fromkeys(_OPTIONAL, _MAX_WIDTH),
}  # fmt: skip
_PER_STAGE = ("layers_per_block", "cross_attention_dim", "attention_head_dim")


def check_unet(config: Mapping[str, Any], where: str) -> None:
    """Check the values of a completed config.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    for key, allowed in _ALLOWED.items():
        if config[key] not in allowed:
            shown = " or ".join(repr(value) for value in allowed)
            raise SourceError(f"{where}: {key}: {config[key]!r} is not supported; supported: {shown}")
    for key in _FLAGS:
        check_flag(key, config[key], where)
    for key in _NUMBERS:
        if isinstance(config[key], bool) or not isinstance(config[key], int | float):
            raise SourceError(f"{where}: {key}: {config[key]!r} is not a number")
        if not isfinite(config[key]):
            raise SourceError(f"{where}: {key}: {config[key]!r} is not finite")
    for key, limit in _INTEGERS.items():
        if config[key] is not None or key not in _OPTIONAL:
            check_integer(key, config[key], limit, where)
    _check_stages(config, where)
    _check_widths(config, where)
    _check_layers(config, where)
    _check_additions(config, where)


def per_stage(config: Mapping[str, Any], key: str) -> list[Any]:
    """Return a value that stands once for all stages, or once for each, as a list with one per stage."""
    value, stages = config[key], len(config["down_block_types"])
    return list(value) if isinstance(value, list | tuple) else [value] * stages


def transformer_layers(config: Mapping[str, Any]) -> tuple[list[list[int]], int, list[list[int]]]:
    """Return the numbers of transformer blocks of each attention: (down per stage, middle, up per stage)."""
    down = per_stage(config, "transformer_layers_per_block")
    given = config["reverse_transformer_layers_per_block"]
    up = list(reversed(down)) if given is None else list(given)
    layers = per_stage(config, "layers_per_block")
    middle = down[-1] if isinstance(down[-1], int) else down[-1][0]
    return (
        [_spread(value, count) for value, count in zip(down, layers, strict=True)],
        middle,
        [_spread(value, count + 1) for value, count in zip(up, reversed(layers), strict=True)],
    )


def layer_count(config: Mapping[str, Any]) -> int:
    """Return how many residual and transformer blocks there are at least; each has tensors of its own."""
    down, middle, up = transformer_layers(config)
    kinds = (*config["down_block_types"], *config["up_block_types"])
    layers = sum(
        sum(counts) for kind, counts in zip(kinds, (*down, *up), strict=True) if kind.startswith("CrossAttn")
    )
    # The middle is left out of models that say so; what counts here is what is there in any case.
    middle = middle if config["mid_block_type"] is not None else 0
    return layers + middle + sum(2 * count + 1 for count in per_stage(config, "layers_per_block"))


def _spread(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)


def _check_stages(config: Mapping[str, Any], where: str) -> None:
    for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        _check_kinds(key, config[key], known, where)
    stages = len(config["down_block_types"])
    if len(config["up_block_types"]) != stages:
        raise SourceError(
            f"{where}: {stages} down_block_types, but {len(config['up_block_types'])} up_block_types"
        )
    for key in ("block_out_channels", *_PER_STAGE):
        value = config[key]
        if isinstance(value, list | tuple):
            if len(value) != stages:
                raise SourceError(f"{where}: {key} has {len(value)} entries; the model has {stages} stages")
        elif key == "block_out_channels":
            raise SourceError(f"{where}: {key}: {value!r} is not a list")
        for item in per_stage(config, key):
            check_integer(key, item, MAX_LAYERS if key == "layers_per_block" else _MAX_WIDTH, where)


def _check_kinds(key: str, kinds: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(kinds, list | tuple) or not 1 <= len(kinds) <= _MAX_STAGES:
        raise SourceError(f"{where}: {key}: {kinds!r} is not a list of 1 to {_MAX_STAGES} kinds of blocks")
    for kind in kinds:
        if kind not in known:
            raise SourceError(f"{where}: {key}: {kind!r} is not supported; supported: {', '.join(known)}")


def _check_widths(config: Mapping[str, Any], where: str) -> None:
    groups, last = config["norm_num_groups"], len(config["block_out_channels"]) - 1
    heads = per_stage(config, "attention_head_dim")
    for index, (width, count) in enumerate(zip(config["block_out_channels"], heads, strict=True)):
        if width % groups:
            raise SourceError(f"{where}: norm_num_groups {groups} does not divide {width} channels")
        kinds = (config["down_block_types"][index], config["up_block_types"][last - index])
        if width % count and (index == last or any(kind.startswith("CrossAttn") for kind in kinds)):
            raise SourceError(
                f"{where}: attention_head_dim {count} (the number of heads) does not divide {width} channels"
            )
    if len(set(per_stage(config, "cross_attention_dim"))) > 1:
        raise SourceError(f"{where}: cross_attention_dim: one text cannot have several widths")
    if config["in_channels"] != config["out_channels"]:
        raise SourceError(
            f"{where}: in_channels {config['in_channels']} is not out_channels {config['out_channels']}:"
            " the model needs an image beside the noise",
            hint="only models that draw from noise and text can be calibrated",
        )
    for key in ("conv_in_kernel", "conv_out_kernel"):
        if config[key] % 2 == 0:
            raise SourceError(f"{where}: {key} {config[key]} is even, which changes the size of the image")
    stages = len(config["down_block_types"])
    if config["sample_size"] >> (stages - 1) == 0:
        raise SourceError(f"{where}: sample_size {config['sample_size']} cannot be halved {stages - 1} times")


def _check_layers(config: Mapping[str, Any], where: str) -> None:
    layers = per_stage(config, "layers_per_block")
    down, up = config["transformer_layers_per_block"], config["reverse_transformer_layers_per_block"]
    nested = isinstance(down, list | tuple) and any(isinstance(item, list | tuple) for item in down)
    if nested and up is None:
        raise SourceError(
            f"{where}: transformer_layers_per_block has lists inside, and"
            " reverse_transformer_layers_per_block is missing"
        )
    _check_counts("transformer_layers_per_block", down, layers, where)
    if up is not None:
        reverse = [count + 1 for count in reversed(layers)]
        _check_counts("reverse_transformer_layers_per_block", up, reverse, where)
    total = layer_count(config)
    if total > MAX_LAYERS:
        raise SourceError(f"{where}: layers_per_block and transformer_layers_per_block make {total} layers;"
                          f" at most {MAX_LAYERS}")  # fmt: skip


def _check_counts(key: str, value: Any, counts: Sequence[int], where: str) -> None:
    if is_integer(value, 1, MAX_LAYERS) and key == "transformer_layers_per_block":
        return
    if not isinstance(value, list | tuple) or len(value) != len(counts):
        raise SourceError(f"{where}: {key}: {value!r} is not a list with one entry for each stage")
    for item, count in zip(value, counts, strict=True):
        if isinstance(item, list | tuple):
            if len(item) != count:
                raise SourceError(f"{where}: {key}: {item!r} is not a list of {count} numbers of blocks")
            for number in item:
                check_integer(key, number, MAX_LAYERS, where)
        else:
            check_integer(key, item, MAX_LAYERS, where)


def _check_additions(config: Mapping[str, Any], where: str) -> None:
    if config["addition_embed_type"] is None:
        return
    inputs, width = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"):
        if config[key] is None:
            raise SourceError(f"{where}: addition_embed_type 'text_time' needs {key}")
    if inputs <= TIME_IDS * width:
        raise SourceError(
            f"{where}: projection_class_embeddings_input_dim {inputs} leaves no place for a text beside"
            f" {TIME_IDS} sizes of {width} numbers"
        )
