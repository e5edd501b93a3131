"""How a folder was verified whose tensors were compared and whose outputs were not. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TENSORS_ALONE = (
    "verified by its tensors: in a fresh process every one was bit for bit what the source holds; no outputs"
    " were computed or compared"
)
"""How a note of the report begins that says so."""


def compared_tensors(export: Mapping[str, Any]) -> bool:
    """Tell whether a report's `export` was verified by its tensors, and not by its outputs."""
    notes = export.get("notes", ())
    return isinstance(notes, list | tuple) and any(str(note).startswith(TENSORS_ALONE) for note in notes)
