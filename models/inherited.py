"""What a checkpoint says of blocks that earlier runs have removed from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PlanError, SourceError
from .blocks import depths
from .origins import NAME, blocks_of_first, handed_on

MAX_BYTES = 2**20


def inherited(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the file of origins that a run on a checkpoint begins with; None: nothing was removed from it.

    Args:
        folder: of the checkpoint.
        config: of the same, completed, with `_class_name`.

    Raises:
        SourceError: the file beside the weights is damaged, or is about another model.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise SourceError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    try:
        text = handed_on(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8: {error.reason}", hint="the file is damaged") from None
    except SourceError as error:
        raise SourceError(f"{path}: {error.message}", hint=error.hint) from None
    try:
        known = depths(config)
    except PlanError:
        known = {}
    for name, row in blocks_of_first(text).items():
        if known.get(name) != len(row["kept"]):
            shown = name if name in known else repr(name)  # of a stranger: it may hold anything
            raise SourceError(
                f"{path}: says that {len(row['kept'])} blocks of {shown} are left, and the config has"
                f" {known.get(name, 'no such list')}",
                hint="the file is of another model; remove it where that is known",
            )
    return text
