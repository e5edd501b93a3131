"""A model whose blocks can be weighted or left out while it runs, without being changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockList, block_lists

Masks = Mapping[str, Tensor]
"""Name of a list of blocks -> [batch, blocks] or [blocks], 1: the block is there, 0: it is not."""


class Gates:
    """What the blocks of a gated model are weighted with; `masks` may be changed between forwards.

    Attributes:
        masks: see `Masks`; lists that are not named run as they are.
    """

    def __init__(self) -> None:
        self.masks: Masks = {}


@contextmanager
def gated(module: nn.Module, class_name: str) -> Iterator[Gates]:
    """Let every block compute x + m * (block(x) - x), as m * block(x) + (1 - m) * x, in all its streams.

    So m = 1 and m = 0 give the block's output and its input exactly, and m has a gradient. A block that is
    0 for a whole batch is left out where no gradient is wanted.

    Args:
        module: a stock module; its forward is as before afterwards.
        class_name: of the module.
    """
    gates = Gates()
    changed: list[nn.Module] = []
    try:
        for blocks in block_lists(class_name):
            for place, block in enumerate(module.get_submodule(blocks.name).children()):
                block.forward = _forward(block, blocks, place, gates)
                changed.append(block)
        yield gates
    finally:
        for block in changed:
            del block.forward


def _forward(block: nn.Module, blocks: BlockList, place: int, gates: Gates) -> Any:
    plain = block.forward
    signature = inspect.signature(plain)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        masks = gates.masks.get(blocks.name)
        if masks is None:
            return plain(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        inputs = tuple(given[name] for name in blocks.returns)
        mask = masks[..., place]
        if not torch.is_grad_enabled() and not bool(mask.any()):
            return inputs if len(inputs) > 1 else inputs[0]
        outputs = plain(*args, **kwargs)
        if len(blocks.returns) == 1:
            return _mixed(outputs, inputs[0], mask)
        # The last block of some models returns nothing for the stream that ends there.
        return tuple(
            None if output is None else _mixed(output, before, mask)
            for output, before in zip(outputs, inputs, strict=True)
        )

    return forward


def _mixed(output: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(output.dtype)
    if weights.ndim:
        weights = _for_rows(weights, len(output)).view(-1, *(1 for _ in output.shape[1:]))
    return weights * output + (1 - weights) * before


def _for_rows(weights: Tensor, rows: int) -> Tensor:
    """Guidance runs several halves of one batch: each has the masks of the batch."""
    return weights if len(weights) == rows else weights.repeat(rows // len(weights))
