"""Sizes and counts as people write them: `5GB`, `512MiB`, `4.2G`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

SIZE_PATTERN = r"^ *[0-9]+(\.[0-9]+)? *([kKmMgG][iI]?)?[bB]? *$"
"""What `bytes_of` reads, for editors."""

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def bytes_of(value: Any) -> Any:
    """Read `5GB`, `512MiB` or `5e9` as a number of bytes; what is no text and no whole float comes back.

    Raises:
        ValueError: text that is not a size.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    return _read(value, _BYTES, "a size; write bytes, or a number with KB, MB, GB, KiB, MiB or GiB")


def count_of(value: Any) -> Any:
    """Read `4.2G` or `20.7M` as a number; what is no text comes back.

    Raises:
        ValueError: text that is not a count.
    """
    if not isinstance(value, str):
        return value
    return _read(value, _COUNTS, "a count; write a number, alone or with K, M, G (or B) or T")


def _read(text: str, units: dict[str, int], wanted: str) -> int:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2].lower() not in units:
        raise ValueError(f"{text!r} is not {wanted}")
    return int(Decimal(found[1]) * units[found[2].lower()])
