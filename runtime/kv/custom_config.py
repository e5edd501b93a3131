"""The config of a checkpoint that brings the code of its compressed cache along. Torch-free.

It has a `model_type` and a class of its own, so that no stock class takes the checkpoint for one of its own,
and says by `KEY` how the cache is compressed. Without these it is the stock class's config; nothing of ours
runs the code, and everything of ours goes by that config and the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SourceError
from .scheme import KvCacheScheme

KEY = "cskv"
"""Of config.json: the scheme, as the manifest has it."""
_CLASS, _TYPE = "Cskv", "cskv_"


def is_custom(config: Mapping[str, Any]) -> bool:
    """Tell whether a config is of a checkpoint with such code."""
    return KEY in config


def own_class(class_name: str) -> str:
    """Return the class of its own that stands for a stock class."""
    return f"{_CLASS}{class_name}"


def own_type(model_type: str) -> str:
    """Return the `model_type` of its own that stands for a stock one."""
    return f"{_TYPE}{model_type}"


def custom_config(
    config: Mapping[str, Any], scheme: KvCacheScheme, auto_map: Mapping[str, str]
) -> dict[str, Any]:
    """Return the config of a checkpoint with such code.

    Args:
        config: config.json of the same checkpoint without it, with `architectures` and `model_type`.
        scheme: of its cache.
        auto_map: where transformers finds the classes.
    """
    return {
        **config,
        "architectures": [own_class(name) for name in config["architectures"]],
        "model_type": own_type(str(config["model_type"])),
        "auto_map": dict(auto_map),
        KEY: scheme.model_dump(mode="json"),
    }


def stock_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the stock class's config of a config with such code.

    Args:
        config: of `is_custom`.
        where: for messages.

    Raises:
        SourceError: its class or `model_type` is not its own.
    """
    names, model_type = config.get("architectures"), config.get("model_type")
    own = isinstance(names, list) and all(isinstance(name, str) and name.startswith(_CLASS) for name in names)
    if not (own and names and isinstance(model_type, str) and model_type.startswith(_TYPE)):
        raise SourceError(
            f"{where}: says {KEY!r}, and its architectures and model_type are not of a compressed cache",
            hint="the config was changed by hand; export the folder again",
        )
    plain = {key: value for key, value in config.items() if key not in (KEY, "auto_map")}
    return {
        **plain,
        "architectures": [name.removeprefix(_CLASS) for name in names],
        "model_type": model_type.removeprefix(_TYPE),
    }


def check_same(config: Mapping[str, Any], scheme: KvCacheScheme | None, where: str) -> None:
    """Refuse a config whose code would compress the cache otherwise than the manifest says.

    Args:
        config: of `is_custom`.
        scheme: of the manifest.
        where: for messages.

    Raises:
        SourceError: they differ.
    """
    if scheme is None or config[KEY] != scheme.model_dump(mode="json"):
        raise SourceError(
            f"{where}: its {KEY!r} is not how compress.json says that the cache is compressed",
            hint="one of the two files was changed by hand; export the folder again",
        )
