"""Limits on single values of a config, which is untrusted input. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError

MAX_WIDTH = 2**20
"""Channels, of all heads together as well."""
MAX_LAYERS = 2**12


def is_integer(value: Any, low: int, high: int) -> bool:
    """Tell whether a value is an integer from `low` to `high`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_flag(key: str, value: Any, where: str) -> None:
    """Refuse what is neither true nor false.

    Raises:
        SourceError: naming `where` and the key.
    """
    if not isinstance(value, bool):
        raise SourceError(f"{where}: {key}: {value!r} is not true or false")


def check_integer(key: str, value: Any, limit: int, where: str) -> None:
    """Refuse what is no integer from 1 to `limit`.

    Raises:
        SourceError: naming `where` and the key.
    """
    if not is_integer(value, 1, limit):
        raise SourceError(f"{where}: {key}: {value!r} is not an integer from 1 to {limit}")


def check_numbers(key: str, value: Any, limit: float, where: str) -> None:
    """Hold every number in a value, however deep, against the largest that a model has.

    Raises:
        SourceError: naming `where` and the key; also for what is no number.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict | list):
            waiting.extend(item.values() if isinstance(item, dict) else item)
        elif isinstance(item, int | float) and not abs(item) <= limit:
            raise SourceError(f"{where}: {key} {item} is out of range", hint="the config was changed by hand")


def check_number(key: str, value: Any, low: float, high: float, where: str) -> None:
    """Refuse what is no number from `low` to `high`.

    Raises:
        SourceError: naming `where` and the key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise SourceError(f"{where}: {key}: {value!r} is not a number from {low:g} to {high:g}")


def check_shared_keys(config: Mapping[str, Any], model_type: str, limit: float, where: str) -> None:
    """Check what all configs of transformers may say, whatever the class.

    Args:
        config: of config.json.
        model_type: of the class.
        limit: the largest number that a model has.
        where: for messages.

    Raises:
        SourceError: naming `where` and the key.
    """
    if config.get("model_type", model_type) != model_type:
        raise SourceError(f"{where}: model_type {config['model_type']!r} is not {model_type!r}")
    for key, value in config.items():
        check_numbers(key, value, limit, where)
    for key in ("dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | None):
            raise SourceError(f"{where}: {key}: {config[key]!r} is not the name of a type")
    for key in ("layer_norm_eps", "rms_norm_eps"):
        if key in config:
            check_number(key, config[key], 0.0, 1.0, where)
