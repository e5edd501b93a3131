"""What the config of an image classifier of transformers may say, and what follows from it. Torch-free.

As for language models, a config is kept as it stands: labels, means and anything else that stock code
understands reaches the exported folder unchanged. What decides shapes, or how much memory a constructor
takes, is read here and held against limits, because a config is untrusted input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SourceError
from .config_values import MAX_LAYERS, MAX_WIDTH, check_flag, check_integer, check_shared_keys, is_integer
from .vision_sizes import (
    VISION_CLASSES,
    VISION_KINDS,
    SwinShape,
    convnext_shape,
    image_shape,
    layer_count,
    structural,
    swin_shape,
    vit_shape,
)

MAX_STAGES = 16
MAX_LABELS = 2**20
MAX_CHANNELS = 2**12
MAX_SIDE = 2**14  # pixels of an image
MAX_TOKENS = 2**18
MAX_WINDOW = 32  # a table of window^4 indices is computed for every block
MAX_NUMBER = 2.0**40
SPARE_TABLE_BYTES = 16 * 2**20

_INTEGERS: Mapping[str, int] = {
    "hidden_size": MAX_WIDTH, "num_hidden_layers": MAX_LAYERS, "num_attention_heads": MAX_WIDTH,
    "intermediate_size": MAX_WIDTH, "num_channels": MAX_CHANNELS, "num_stages": MAX_STAGES,
    "embed_dim": MAX_WIDTH, "window_size": MAX_WINDOW,
}  # fmt: skip
_LISTS: Mapping[str, int] = {"hidden_sizes": MAX_WIDTH, "depths": MAX_LAYERS, "num_heads": MAX_WIDTH}
_FLAGS = ("qkv_bias", "use_absolute_embeddings")
_PAIRS = ("image_size", "patch_size")


def complete_vision_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    model_type = VISION_CLASSES[class_name][0]
    check_shared_keys(config, model_type, MAX_NUMBER, where)
    for key, value in structural(class_name, config).items():
        _check_value(key, value, where)
    if "head_dim" in config:
        check_integer("head_dim", config["head_dim"], MAX_WIDTH, where)
    _check_labels(config, where)
    full = {**config, "_class_name": class_name}
    _check_images(full, where)
    _CHECKS[VISION_KINDS[model_type]](full, where)
    return full


def check_vision_config(
    class_name: str, config: Mapping[str, Any], tensors: int, size: int, where: str
) -> None:
    """Refuse a config that its checkpoint cannot belong to, before anything of its sizes is built.

    Args:
        config: config.json of a folder.
        tensors: how many the folder stores.
        size: bytes of all tensors.
        where: for the message.

    Raises:
        SourceError: naming the first value that is wrong.
    """
    full = complete_vision_config(class_name, config, where)
    layers = layer_count(full)
    if layers > tensors:
        raise SourceError(f"{where}: {layers} layers with only {tensors} stored tensors")
    if VISION_KINDS[VISION_CLASSES[class_name][0]] == "swin":
        shape = swin_shape(full)
        table = 8 * shape.window**4 * sum(shape.depths)
        if table > size + SPARE_TABLE_BYTES:
            raise SourceError(
                f"{where}: window_size {shape.window} gives tables of {table} bytes for positions, but the"
                f" weights have only {size}",
                hint="the config was changed by hand, or belongs to other weights",
            )


def _check_value(key: str, value: Any, where: str) -> None:
    if key in _INTEGERS:
        check_integer(key, value, _INTEGERS[key], where)
    elif key in _LISTS:
        _check_list(key, value, where)
    elif key in _FLAGS:
        check_flag(key, value, where)
    elif key in _PAIRS:
        sides = value if isinstance(value, list | tuple) else (value, value)
        if len(sides) != 2 or not all(is_integer(side, 1, MAX_SIDE) for side in sides):
            raise SourceError(f"{where}: {key}: {value!r} is not one or two integers from 1 to {MAX_SIDE}")
    elif isinstance(value, bool) or not isinstance(value, int | float):  # mlp_ratio, layer_scale_init_value
        raise SourceError(f"{where}: {key}: {value!r} is not a number")


def _check_list(key: str, value: Any, where: str) -> None:
    limit = _LISTS[key]
    good = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_STAGES
    if not good or not all(is_integer(item, 1, limit) for item in value):
        raise SourceError(
            f"{where}: {key}: {value!r} is not a list of 1 to {MAX_STAGES} integers from 1 to {limit}"
        )


def _check_labels(config: Mapping[str, Any], where: str) -> None:
    """Hold the number of classes against limits; stock code counts the names of the labels."""
    names, count = config.get("id2label"), config.get("num_labels")
    if names is not None and not isinstance(names, dict):
        raise SourceError(f"{where}: id2label: {type(names).__name__} is not a mapping of classes to names")
    if count is not None:
        check_integer("num_labels", count, MAX_LABELS, where)
    if names is None:
        return
    if not 1 <= len(names) <= MAX_LABELS:
        raise SourceError(f"{where}: id2label names {len(names)} classes; 1 to {MAX_LABELS} are supported")
    if count is not None and count != len(names):
        raise SourceError(f"{where}: num_labels {count}, but id2label names {len(names)} classes")


def _check_images(config: Mapping[str, Any], where: str) -> None:
    images = image_shape(config)
    tokens = images.grid[0] * images.grid[1]
    if not 1 <= tokens <= MAX_TOKENS:
        raise SourceError(
            f"{where}: image_size {images.size} and patch_size {images.patch} make {tokens} patches;"
            f" 1 to {MAX_TOKENS} are supported"
        )


def _check_vit(config: Mapping[str, Any], where: str) -> None:
    shape = vit_shape(config)
    if config.get("head_dim") is None and shape.width % shape.heads:
        raise SourceError(
            f"{where}: num_attention_heads {shape.heads} does not divide hidden_size {shape.width}"
        )
    if shape.heads * shape.head_dim > MAX_WIDTH:
        raise SourceError(
            f"{where}: num_attention_heads * head_dim = {shape.heads * shape.head_dim}; at most {MAX_WIDTH}"
        )


def _check_convnext(config: Mapping[str, Any], where: str) -> None:
    keys = structural(config["_class_name"], config)
    stages = {key: len(keys[key]) for key in ("hidden_sizes", "depths")}
    _check_stages(stages, int(keys["num_stages"]), "num_stages", where)
    if max(keys["hidden_sizes"]) * 4 > MAX_WIDTH:
        raise SourceError(f"{where}: hidden_sizes: 4 * {max(keys['hidden_sizes'])} is over {MAX_WIDTH}")
    _check_depth(keys["depths"], where)
    last = convnext_shape(config).grids[-1]
    if min(last) < 1:
        raise SourceError(
            f"{where}: image_size {image_shape(config).size} leaves {last[0]} x {last[1]} pixels to the last"
            " stage"
        )


def _check_swin(config: Mapping[str, Any], where: str) -> None:
    keys = structural(config["_class_name"], config)
    _check_stages({"num_heads": len(keys["num_heads"])}, len(keys["depths"]), "depths", where)
    _check_depth(keys["depths"], where)
    if not 0 < keys["mlp_ratio"] <= 1024:
        raise SourceError(f"{where}: mlp_ratio {keys['mlp_ratio']} is not over 0 and at most 1024")
    shape = swin_shape(config)
    if 4 * shape.widths[-1] > MAX_WIDTH or shape.inner[-1] > MAX_WIDTH or shape.inner[0] < 1:
        raise SourceError(
            f"{where}: embed_dim {shape.widths[0]} and mlp_ratio {keys['mlp_ratio']} make widths of"
            f" {shape.widths[-1]} and {shape.inner[-1]}; at most {MAX_WIDTH}"
        )
    for stage, (heads, width) in enumerate(zip(shape.heads, shape.widths, strict=True)):
        if width % heads:
            raise SourceError(f"{where}: num_heads[{stage}] {heads} does not divide its width {width}")
    _check_windows(shape, where)


def _check_windows(shape: SwinShape, where: str) -> None:
    """Refuse what stock classes build and then cannot run."""
    for stage, grid in enumerate(shape.grids):
        if min(grid) < shape.window:
            raise SourceError(
                f"{where}: window_size {shape.window} does not fit the {grid[0]} x {grid[1]} tokens of stage"
                f" {stage}, which the stock class cannot compute"
            )
    if shape.positions and shape.images.grid != shape.grids[0]:
        raise SourceError(
            f"{where}: image_size {shape.images.size} is no multiple of patch_size {shape.images.patch}, as"
            " use_absolute_embeddings needs it"
        )


def _check_stages(lengths: Mapping[str, int], stages: int, key: str, where: str) -> None:
    for name, length in lengths.items():
        if length != stages:
            raise SourceError(f"{where}: {name} has {length} entries, but {key} says {stages} stages")


def _check_depth(depths: Sequence[int], where: str) -> None:
    if sum(depths) > MAX_LAYERS:
        raise SourceError(f"{where}: depths: {sum(depths)} blocks; at most {MAX_LAYERS}")


_CHECKS = {"vit": _check_vit, "convnext": _check_convnext, "swin": _check_swin}
