"""Copies of one embedder that are one while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...models.blocks import EMBEDDER, block_lists, differing_embedder, has_embedders


@contextmanager
def tied_embedders(module: nn.Module, class_name: str) -> Iterator[None]:
    """Let the blocks of a DiT share the first block's embedder; afterwards each has its own, equal to it.

    Stock DiT gives each block a copy of the one embedder that the model was trained with; trained apart,
    they would drift apart, and the first of them, which the head reads, most of all. Copies that differ
    already stay what they are. Of other models nothing changes.

    Args:
        module: the denoiser; a parameter that is shared meanwhile goes by its name in the first block.
        class_name: of the stock class.
    """
    if not has_embedders(class_name):
        yield
        return
    (blocks,) = block_lists(class_name)
    owner_name, _, name = EMBEDDER.rpartition(".")
    first, *others = (
        block.get_submodule(owner_name) for block in module.get_submodule(blocks.name).children()
    )
    shared = first.get_submodule(name)
    copies = [
        (owner, owner.get_submodule(name))
        for place, owner in enumerate(others, 1)
        if not differing_embedder(module, place)
    ]
    try:
        for owner, _ in copies:
            setattr(owner, name, shared)
        yield
    finally:
        for owner, own in copies:
            # Tensors of its own: files of safetensors cannot hold a tensor under two names.
            own.load_state_dict(shared.state_dict())
            setattr(owner, name, own)
