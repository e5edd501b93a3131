"""Text files that a stage leaves beside the weights, and that travel with the model from then on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import SourceError
from ..models.origins import NAME as DEPTH_FILE

NAMES: tuple[str, ...] = ("pruning.json", DEPTH_FILE, "experts.json", "slimming.json")
MAX_BYTES = 64 * 2**20


def attached(attachments: Mapping[str, str]) -> Mapping[str, str]:
    """Return the files to write.

    Raises:
        ValueError: a name that `read_attachments` would not find again.
    """
    unknown = sorted(attachments.keys() - set(NAMES))
    if unknown:
        raise ValueError(f"{unknown[0]} is none of the files that may lie beside weights: {', '.join(NAMES)}")
    return attachments


def read_attachments(folder: Path) -> dict[str, str]:
    """Return those that are in a folder: name -> content.

    Raises:
        SourceError: one is too long, or no text.
    """
    found: dict[str, str] = {}
    for name in NAMES:
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_BYTES:
            raise SourceError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        try:
            found[name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: not UTF-8: {error.reason}", hint="the file is damaged") from None
    return found
