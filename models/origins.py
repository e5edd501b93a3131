"""Where the blocks of a shallower model come from: a small file beside its weights. Torch-free.

What a run removed is counted from the model that it began with. Where blocks had gone from that already, in
runs before, the file says as well what those had left of the very first model, and what is left of it now.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SourceError

NAME = "depth.json"
_FORMAT = 1
_GROUP = re.compile(r"[1-9][0-9]{0,2}:[1-9][0-9]{0,2}")


def write_origins(
    before: str | None, kept: Mapping[str, Sequence[int]], depths: Mapping[str, int], about: Mapping[str, Any]
) -> str:
    """Return the file of a model from which blocks have been removed.

    Args:
        before: the file that it had: blocks had been removed from it already, in this run or before.
        kept: list of blocks -> places that stay, in the model as it was before this removal.
        depths: list of blocks -> blocks before this removal.
        about: of the removal: its method and what decided it. JSON values.
    """
    old = _read(before) if before is not None else {"blocks": {}, "removals": [], "earlier": None}
    blocks = dict(old["blocks"])
    for name, places in kept.items():
        row = blocks.get(name, {"of": depths[name], "kept": list(range(depths[name]))})
        blocks[name] = {"of": row["of"], "kept": [row["kept"][place] for place in places]}
    return _written(blocks, [*old["removals"], dict(about)], old["earlier"])


def handed_on(text: str) -> str:
    """Return the file that a run begins with, of the file beside the weights of its model.

    This run has removed nothing; all that the text tells was earlier.

    Raises:
        SourceError: the text is no such file.
    """
    earlier = {"blocks": _of_first(_read(text)), "removals": all_removals(text)}
    return _written({}, [], earlier)


def as_one_run(text: str) -> str:
    """Return the file as if all removals had been of one run: counted from the very first model.

    Raises:
        SourceError: the text is no such file.
    """
    return _written(_of_first(_read(text)), all_removals(text), None)


def blocks_of_first(text: str) -> dict[str, dict[str, Any]]:
    """Return list of blocks -> `of`, how many the very first model has, and `kept`, places in it.

    Raises:
        SourceError: the text is no such file.
    """
    return _of_first(_read(text))


def all_removals(text: str) -> list[dict[str, Any]]:
    """Return what is known of every removal, those of runs before first.

    Raises:
        SourceError: the text is no such file.
    """
    document = _read(text)
    return [*(document["earlier"] or {"removals": []})["removals"], *document["removals"]]


def kept_blocks(text: str) -> dict[str, tuple[int, ...]]:
    """Return list of blocks -> places, in the model that the run began with, of those that are left.

    Raises:
        SourceError: the text is no such file.
    """
    return {name: tuple(row["kept"]) for name, row in _read(text)["blocks"].items()}


def blocks_before(text: str) -> dict[str, int]:
    """Return list of blocks -> how many the model has that the run began with.

    Raises:
        SourceError: the text is no such file.
    """
    return {name: int(row["of"]) for name, row in _read(text)["blocks"].items()}


def removals(text: str) -> list[dict[str, Any]]:
    """Return what is known of every removal of the run, in order.

    Raises:
        SourceError: the text is no such file.
    """
    found: list[dict[str, Any]] = _read(text)["removals"]
    return found


def original_name(name: str, text: str | None) -> str:
    """Return what a module or tensor is called in the model that the run began with.

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


def _written(
    blocks: Mapping[str, Any], removed: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any] | None
) -> str:
    document: dict[str, Any] = {"format": _FORMAT, "blocks": dict(blocks), "removals": list(removed)}
    if earlier is not None:
        document["earlier"] = earlier
        document["original"] = _of_first(document)
    return json.dumps(document, indent=1) + "\n"


def _of_first(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Follow the blocks through both parts of a file; what one of them does not name is whole there."""
    found = {name: dict(row) for name, row in document["blocks"].items()}
    for name, row in ((document.get("earlier") or {}).get("blocks") or {}).items():
        kept = document["blocks"][name]["kept"] if name in document["blocks"] else range(len(row["kept"]))
        found[name] = {"of": row["of"], "kept": [row["kept"][place] for place in kept]}
    return found


def _read(text: str) -> dict[str, Any]:
    """Return the document; `earlier` is there in any case, None where there is nothing to tell."""
    try:
        document = json.loads(text)
        earlier = document.setdefault("earlier", None)
        whole = document["format"] == _FORMAT and _is_part(document)
        whole = whole and bool(document["blocks"] or earlier)
        if whole and earlier is not None:
            whole = _is_part(earlier) and bool(earlier["blocks"]) and _is_chain(document, earlier)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise SourceError(
            f"{NAME} does not say which blocks are left", hint="it was changed by hand, or is damaged"
        )
    found: dict[str, Any] = document
    return found


def _is_part(part: Mapping[str, Any]) -> bool:
    whole = isinstance(part["removals"], list) and all(map(_is_removal, part["removals"]))
    for row in part["blocks"].values():
        kept = row["kept"]
        whole &= all(type(place) is int for place in [*kept, row["of"]]) and bool(kept)
        whole &= sorted(set(kept)) == kept and kept[0] >= 0 and kept[-1] < row["of"]
    return whole


def _is_removal(about: Any) -> bool:
    """Tell whether this can be known of a removal; what its groups are for is not looked at here."""
    if not isinstance(about, dict):
        return False
    groups = about.get("groups")
    return groups is None or all(map(_is_groups, groups.values() if isinstance(groups, dict) else [groups]))


def _is_groups(groups: Any) -> bool:
    rows = groups if isinstance(groups, list) and groups else [groups]
    return all(isinstance(row, str) and _GROUP.fullmatch(row) is not None for row in rows)


def _is_chain(document: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Tell whether the run began with what the earlier ones left, and the sum of both is right."""
    began = {name: row["of"] for name, row in document["blocks"].items()}
    left = {name: len(row["kept"]) for name, row in earlier["blocks"].items()}
    fits = all(began.get(name, count) == count for name, count in left.items())
    return fits and document["original"] == _of_first(document)
