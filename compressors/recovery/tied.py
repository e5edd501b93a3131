"""Copies of one embedder that are one while a model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_EMBEDDER = "emb"
_OWNER = "norm1"
_BLOCKS = "transformer_blocks"


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
    if class_name != "DiTTransformer2DModel":
        yield
        return
    owners = [block.get_submodule(_OWNER) for block in module.get_submodule(_BLOCKS).children()]
    first = owners[0].get_submodule(_EMBEDDER)
    copies = [(owner, own) for owner in owners[1:] if _equal(own := owner.get_submodule(_EMBEDDER), first)]
    try:
        for owner, _ in copies:
            setattr(owner, _EMBEDDER, first)
        yield
    finally:
        for owner, own in copies:
            # Tensors of its own: files of safetensors cannot hold a tensor under two names.
            own.load_state_dict(first.state_dict())
            setattr(owner, _EMBEDDER, own)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
