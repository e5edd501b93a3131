"""JSON from files that anyone may have written. Torch-free.

The standard parser's errors are of four types, and it lets through what breaks its callers later:
names that stand twice, integers of thousands of digits, nesting that no other code can walk.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import SourceError

MAX_DEPTH = 64
_MAX_DIGITS = 20  # enough for every 64-bit number with its sign


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: UTF-8.
        where: what the errors call it, such as the path of the file.

    Raises:
        SourceError: not UTF-8, not JSON, not an object, or more than a file of ours can say.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
        _check_depth(value)
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not JSON: byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise SourceError(f"{where}: not JSON that is read: more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise SourceError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: not a JSON object, but {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} stands twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = [item for item in level if isinstance(item, dict | list)]
        if not inside:
            return
        level = [part for item in inside for part in (item.values() if isinstance(item, dict) else item)]
    raise RecursionError
