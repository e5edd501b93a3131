"""What single blocks are worth, by rules that learn nothing: how much they do, and what the loss says.

Each is told as a number per block of which the least goes first:

- shortgpt (arXiv 2403.03853): 1 - mean cosine of a block's input and output tokens;
- flux_lite: mean square of what a block adds to its input;
- sensitivity: what the loss rises by when the block alone is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...calibration.flags import keeping_flags
from ...calibration.objectives import Objective
from ...models.base import OpenModel
from ...models.blocks import IMAGE, BlockList, Kept, block_lists, depths
from ...models.gating import Gates, gated
from ...progress import Progress, SilentProgress, step
from .measuring import mean_loss

Change = Literal["shortgpt", "flux_lite"]
Scores = dict[str, list[float]]
"""Name of a list of blocks -> a number per block."""


@dataclass
class _Sum:
    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)


@torch.no_grad()
def change_scores(model: OpenModel, objective: Objective, by: Change, progress: Progress) -> Scores:
    """Return how much every block changes what passes through it, on the inputs of the loss.

    Args:
        model: in its own dtype; stays as it is.
        objective: whose inputs are run.
        by: which rule.
        progress: gets one step.
    """
    lists = block_lists(model.config["_class_name"])
    known = depths(model.config)
    sums = {name: [_Sum() for _ in range(depth)] for name, depth in known.items()}
    with keeping_flags(model.module), _watched(model.module, lists, sums, by):
        model.module.eval()
        with step(progress, "what blocks change", objective.parts):
            for _ in objective.losses(model):
                progress.advance(1)
    return {name: [item.mean for item in row] for name, row in sums.items()}


@contextmanager
def _watched(
    module: nn.Module, lists: tuple[BlockList, ...], sums: Mapping[str, list[_Sum]], by: Change
) -> Iterator[None]:
    handles = []
    try:
        for blocks in lists:
            for place, block in enumerate(module.get_submodule(blocks.name).children()):
                hook = _hook(inspect.signature(block.forward), blocks, sums[blocks.name][place], by)
                handles.append(block.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(signature: inspect.Signature, blocks: BlockList, found: _Sum, by: Change) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = signature.bind(*args, **kwargs).arguments[IMAGE]
        values = _values(before.float(), blocks.image_of(output).float(), by)
        found.total += float(values.sum(dtype=torch.float64))
        found.count += values.numel()

    return hook


def _values(before: Tensor, after: Tensor, by: Change) -> Tensor:
    if by == "flux_lite":
        return (after - before).square().mean(dim=-1)
    return 1.0 - F.cosine_similarity(before, after, dim=-1)


def sensitivities(model: OpenModel, objective: Objective, progress: Progress) -> Scores:
    """Return by how much the loss rises without each block alone.

    Args:
        model: stays as it is.
        objective: the loss.
        progress: gets one step.
    """
    with gated(model.module, model.config["_class_name"]) as gates:
        whole = mean_loss(model, objective, progress)
        found: Scores = {}
        known = depths(model.config)
        with step(progress, "loss without each block", sum(known.values())):
            for name, depth in known.items():
                found[name] = []
                for place in range(depth):
                    kept = {name: tuple(other for other in range(depth) if other != place)}
                    found[name].append(_gated_loss(model, gates, objective, kept) - whole)
                    progress.advance(1, f"{name}.{place}: {found[name][-1]:+.4g}")
    return found


def choice_losses(
    model: OpenModel, objective: Objective, choices: list[Kept], progress: Progress
) -> list[float]:
    """Return the loss of a model with each of several choices of its blocks.

    Args:
        model: stays as it is.
        objective: the loss.
        choices: list of blocks -> places that stay.
        progress: gets one step.
    """
    found = []
    with (
        gated(model.module, model.config["_class_name"]) as gates,
        step(progress, "loss of choices", len(choices)),
    ):
        for kept in choices:
            found.append(_gated_loss(model, gates, objective, kept))
            progress.advance(1, f"loss {found[-1]:.4g}")
    return found


def _gated_loss(model: OpenModel, gates: Gates, objective: Objective, kept: Kept) -> float:
    known, device = depths(model.config), next(model.module.parameters()).device
    masks = {name: torch.zeros(known[name], device=device) for name in kept}
    for name, places in kept.items():
        masks[name][list(places)] = 1.0
    gates.masks = masks
    try:
        return mean_loss(model, objective, SilentProgress())
    finally:
        gates.masks = {}
