"""The licence goes with the weights: the source's texts are copied, an unknown licence is said."""

from __future__ import annotations

from pathlib import Path

from ..models.base import Source
from ..progress import Progress


def copy_licence(source: Source, folder: Path, progress: Progress) -> list[str]:
    """Copy the source's licence and notice files into an export, and warn where no licence is known.

    Args:
        source: of the weights.
        folder: of the export.
        progress: gets the warning.

    Returns:
        The names of the files that were written.
    """
    card = source.card
    if card.license is None:
        place = "its model card" if card.base_model else "its README.md"
        progress.warn(
            f"{name_of(source)}: the licence is not known, and the card names none;"
            f" {place} has no `license` that could be read"
        )
    for path in card.texts:
        (folder / path.name).write_bytes(path.read_bytes())
    return [path.name for path in card.texts]


def name_of(source: Source) -> str:
    """Return what a reader elsewhere may see of a source: no path of this machine."""
    is_named = source.revision is not None or source.id.startswith("builtin:")
    return source.id if is_named else source.card.base_model or source.folder.resolve().name
