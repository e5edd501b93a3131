"""What blocks put out, of two models, and how far apart it is where a few values are enormous.

Diffusion transformers have single values hundreds of standard deviations from the others, and a mean
square is then about these alone. So values beyond some standard deviations are masked, in each model by
its own mean and deviation (arXiv 2412.01199).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from ...models.blocks import BlockList, block_lists


@contextmanager
def block_outputs(
    module: nn.Module, class_name: str, places: Mapping[str, Sequence[int]]
) -> Iterator[dict[tuple[str, int], Tensor]]:
    """Yield (list, place) -> the image that the block put out in the last forward, with its graph.

    Args:
        module: a stock module; it is as before afterwards.
        class_name: of the module.
        places: list of blocks -> those that are watched.
    """
    found: dict[tuple[str, int], Tensor] = {}
    handles = []
    try:
        for blocks in block_lists(class_name):
            for place in places.get(blocks.name, ()):
                block = module.get_submodule(f"{blocks.name}.{place}")
                handles.append(block.register_forward_hook(_keep(found, blocks, place)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keep(found: dict[tuple[str, int], Tensor], blocks: BlockList, place: int) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        found[blocks.name, place] = blocks.image_of(output)

    return hook


def near_mean(values: Tensor, sigmas: float) -> Tensor:
    """Return where values are less than so many standard deviations from their mean, item by item.

    Args:
        values: [b, ...] float32.
        sigmas: how many.
    """
    flat = values.detach().flatten(1)
    apart = (flat - flat.mean(1, keepdim=True)).abs()
    near: Tensor = apart < sigmas * flat.std(1, correction=0, keepdim=True)
    return near.view_as(values)


def feature_losses(
    ours: Tensor, theirs: Tensor, *, mask: Literal["zero", "exclude", "none"], sigmas: float
) -> Tensor:
    """Return the mean square between two outputs, item by item: [b] float32.

    Args:
        ours: [b, tokens, channels], takes the gradient.
        theirs: the same shape.
        mask: zero: values that are far are 0, in each by itself; exclude: where one is far, the pair does
            not count; none: everything counts.
        sigmas: see `near_mean`.
    """
    ours, theirs = ours.float(), theirs.detach().float()
    if mask == "none":
        return (ours - theirs).square().flatten(1).mean(1)
    near, other = near_mean(ours, sigmas), near_mean(theirs, sigmas)
    if mask == "zero":
        return (ours * near - theirs * other).square().flatten(1).mean(1)
    both = (near & other).flatten(1)
    squares = (ours - theirs).square().flatten(1).masked_fill(~both, 0.0)
    return squares.sum(1) / both.sum(1).clamp_min(1)


def feature_weight(weight: float, step: int, steps: int) -> float:
    """Return the weight of the distance at a step: a line from `weight` at the first to 0 at the last."""
    return weight if steps == 1 else weight * (1 - step / (steps - 1))
