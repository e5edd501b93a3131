"""How long, in which order, and how fast: pure functions of the settings, the seed and the step.

Nothing here remembers anything, so a training that was killed goes on as if it never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, pi

import torch
from torch import Tensor

from ...calibration.seeds import generator_for
from ...recipes.recovery import TrainingSettings


def step_count(settings: TrainingSettings, items: int) -> int:
    """Return how many optimizer steps there are.

    Args:
        settings: with `steps`, or with `epochs`; the last step of these may go over their end.
        items: of the training data.
    """
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None  # the settings hold one of the two
    return max(1, ceil(settings.epochs * items / settings.batch_size))


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Return the learning rate of one step: a line up to `lr`, then half a cosine down to `min_lr`.

    Args:
        settings: `lr`, `min_lr`, `warmup`.
        step: from 0. The first one has a share of `lr`, not 0; the cosine would be at `min_lr` in the
            step after the last one.
        steps: all of them.
    """
    rising = round(settings.warmup * steps)
    if step < rising:
        return settings.lr * (step + 1) / rising
    done = (step - rising) / (steps - rising)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + cos(pi * done)) / 2


def item_order(seed: int, items: int) -> Callable[[int, int], Tensor]:
    """Return `batch(step, size) -> [size] int64`: which items a step trains on.

    Every pass over the data has an order of its own, and nothing is left out at its end: a batch may
    begin in one pass and end in the next.

    Args:
        seed: of the stage.
        items: how many there are, at least 1.
    """
    known: dict[int, Tensor] = {}

    def shuffled(number: int) -> Tensor:
        if number not in known:
            known.pop(number - 2, None)  # only two passes can meet in a batch that is not larger than both
            known[number] = torch.randperm(items, generator=generator_for(seed, "order", number))
        return known[number]

    def batch(step: int, size: int) -> Tensor:
        chosen: list[Tensor] = []
        position, missing = step * size, size
        while missing:
            number, start = divmod(position, items)
            part = shuffled(number)[start : start + missing]
            chosen.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(chosen)

    return batch
