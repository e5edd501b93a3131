"""The loss of a model as it is now, on calibration samples."""

from __future__ import annotations

import torch

from ...calibration.flags import keeping_flags
from ...calibration.objectives import Objective
from ...models.base import OpenModel
from ...progress import Progress, step


def mean_loss(model: OpenModel, objective: Objective, progress: Progress) -> float:
    """Return the mean loss of a model as it is now, without gradients."""
    total, samples = 0.0, 0
    with keeping_flags(model.module), torch.no_grad(), step(progress, "loss", objective.parts):
        model.module.eval()
        for loss, count in objective.losses(model):
            total += float(loss)
            samples += count
            progress.advance(1, f"loss {total / samples:.4g}")
    return total / samples
