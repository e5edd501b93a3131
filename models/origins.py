"""Where the blocks of a shallower model come from: a small file beside its weights. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SourceError

NAME = "depth.json"
_FORMAT = 1


def write_origins(
    before: str | None, kept: Mapping[str, Sequence[int]], depths: Mapping[str, int], about: Mapping[str, Any]
) -> str:
    """Return the file of a model from which blocks have been removed.

    Args:
        before: the file that it had, where blocks had been removed from it already.
        kept: list of blocks -> places that stay, in the model as it was before this removal.
        depths: list of blocks -> blocks before this removal.
        about: of the removal: its method and what decided it. JSON values.
    """
    old = _read(before) if before is not None else {"blocks": {}, "removals": []}
    blocks = dict(old["blocks"])
    for name, places in kept.items():
        row = blocks.get(name, {"of": depths[name], "kept": list(range(depths[name]))})
        blocks[name] = {"of": row["of"], "kept": [row["kept"][place] for place in places]}
    document = {"format": _FORMAT, "blocks": blocks, "removals": [*old["removals"], dict(about)]}
    return json.dumps(document, indent=1) + "\n"


def kept_blocks(text: str) -> dict[str, tuple[int, ...]]:
    """Return list of blocks -> places in the original of the blocks that are left.

    Raises:
        SourceError: the text is no such file.
    """
    return {name: tuple(row["kept"]) for name, row in _read(text)["blocks"].items()}


def blocks_before(text: str) -> dict[str, int]:
    """Return list of blocks -> how many the original has.

    Raises:
        SourceError: the text is no such file.
    """
    return {name: int(row["of"]) for name, row in _read(text)["blocks"].items()}


def removals(text: str) -> list[dict[str, Any]]:
    """Return what is known of every removal, in order.

    Raises:
        SourceError: the text is no such file.
    """
    found: list[dict[str, Any]] = _read(text)["removals"]
    return found


def original_name(name: str, text: str | None) -> str:
    """Return what a module or tensor is called in the original.

    Args:
        name: in the model as it is.
        text: the file of the model; None: no block was removed.
    """
    for blocks, places in (kept_blocks(text) if text is not None else {}).items():
        prefix = f"{blocks}."
        if name.startswith(prefix):
            number, dot, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{places[int(number)]}{dot}{rest}"
    return name


def _read(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
        whole = document["format"] == _FORMAT and isinstance(document["removals"], list)
        for row in document["blocks"].values():
            kept = row["kept"]
            whole &= all(type(place) is int for place in [*kept, row["of"]]) and bool(kept)
            whole &= sorted(set(kept)) == kept and kept[0] >= 0 and kept[-1] < row["of"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise SourceError(
            f"{NAME} does not say which blocks are left", hint="it was changed by hand, or is damaged"
        )
    found: dict[str, Any] = document
    return found
