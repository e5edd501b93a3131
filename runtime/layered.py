"""Configs that say the sizes of every layer, in the words of transformers (`per_layer_config`).

The stock vision classes read such a config and refuse to build from it, which keeps code that does not
know us from filling a cut model with random numbers. We build from the sizes that hold for the whole
model and cut what the manifest lists; what the config says of the layers must then be what is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import SourceError

KEY = "per_layer_config"
_LAYER = re.compile(r"(?:.*\.)?layers\.([0-9]+)")
_HINT = "one of the two was changed by hand; export again"


def homogeneous(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without what it says of single layers."""
    return {key: value for key, value in config.items() if key != KEY}


def check_layers_agree(module: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Hold what a config says of its layers against the module that was cut by the manifest.

    Args:
        module: built from the homogeneous config, and cut.
        config: with `per_layer_config`, or without it: then nothing is checked.
        where: for the message.

    Raises:
        SourceError: naming the layer and the key.
    """
    stated = config.get(KEY)
    if stated is None:
        return
    if not isinstance(stated, Mapping):
        raise SourceError(f"{where}: {KEY} is not a mapping from layers to sizes", hint=_HINT)
    found = {_LAYER.fullmatch(name): child for name, child in module.named_modules()}
    layers = {match[1]: child for match, child in found.items() if match is not None}
    for index, sizes in stated.items():
        layer = layers.get(str(index).lstrip("0") or "0")  # transformers writes indices of equal lengths
        if layer is None or not isinstance(sizes, Mapping):
            raise SourceError(f"{where}: {KEY}.{index}: the model has no such layer", hint=_HINT)
        real = dict(_sizes(layer))
        for key, value in sizes.items():
            if key not in real or type(value) is not int or real[key] != value:
                raise SourceError(
                    f"{where}: {KEY}.{index}.{key}: {value!r}, but the manifest leaves {real.get(key)}",
                    hint=_HINT,
                )


def _sizes(layer: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield what a config can say of a layer of a vision transformer."""
    for child in layer.modules():
        for key in ("num_attention_heads", "head_dim"):
            value = getattr(child, key, None)
            if isinstance(value, int):
                yield key, value
        inner = getattr(child, "fc1", None)
        if isinstance(inner, nn.Linear):
            yield "intermediate_size", inner.out_features
