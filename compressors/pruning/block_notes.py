"""What all stages that remove whole blocks say of it, whatever decides which ones."""

from __future__ import annotations

from ...models.base import ModelSpec, OpenModel
from ...models.blocks import depths, pinned_blocks
from ...progress import Progress


def notes_on_depth(before: ModelSpec, after: ModelSpec, more: str = "") -> list[str]:
    """Return a sentence for every list of blocks that becomes shorter.

    Args:
        before: the model as the stage finds it.
        after: as it leaves it.
        more: what every sentence goes on with.
    """
    left = depths(after.config)
    return [
        f"{name}: {left[name]} of {depth} blocks stay{more}"
        for name, depth in depths(before.config).items()
        if left[name] < depth
    ]


def pinned_and_told(model: OpenModel, progress: Progress) -> set[tuple[str, int]]:
    """Return (list, place) of blocks that cannot go, after telling the user of them.

    Args:
        model: as the stage finds it.
        progress: gets a note where there are any.
    """
    pinned = pinned_blocks(model.module, model.config)
    if pinned:
        progress.note(
            "block 0 stays: the model's head reads its embedder, of which the other blocks have other copies"
        )
    return pinned
