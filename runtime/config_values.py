"""Limits on single values of a config, which is untrusted input. Torch-free."""

from __future__ import annotations

from typing import Any

from ..errors import SourceError


def is_integer(value: Any, low: int, high: int) -> bool:
    """Tell whether a value is an integer from `low` to `high`; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


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
