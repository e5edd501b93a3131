"""Other rankings at equal cost: what the stage's own is held against, on the same samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...calibration.objectives import Objective
from ...errors import PlanError
from ...models.base import OpenModel
from ...progress import Progress
from ...recipes.pruning import IsomorphicSettings
from .cutting import cut
from .groups import Group
from .measuring import mean_loss
from .selection import ranked, realise
from .target import Counter, Search


def apart(model: OpenModel) -> OpenModel:
    """Return a copy with tensors of its own, which can be cut while the model stays whole."""
    return replace(
        model,
        module=copy.deepcopy(model.module),
        config=dict(model.config),
        surgery=dict(model.surgery),
        quantization=dict(model.quantization),
        history=list(model.history),
        attachments=dict(model.attachments),
        shared=dict(model.shared),
    )


def measure_baselines(
    model: OpenModel,
    groups: Sequence[Group],
    scores: Mapping[str, torch.Tensor],
    settings: IsomorphicSettings,
    objective: Objective,
    macs: int,
    progress: Progress,
) -> dict[str, Any]:
    """Cut copies of a model by other rankings to at most `macs`, and measure their loss.

    Args:
        model: before the stage; stays as it is.
        groups: of the same.
        scores: of the same: all rankings see equal ones.
        settings: of the stage; its shares are the proportions.
        objective: whose loss is measured.
        macs: what the stage's own ranking leaves.
        progress: sees the measurements.

    Returns:
        Ranking -> {"loss", "macs"}; without those that cannot reach as few operations.
    """
    measured: dict[str, Any] = {}
    for name in settings.baselines:
        other = settings.model_copy(update={"ranking": name, "target": None})
        count = Counter(model.dense(), groups)
        try:
            scopes = ranked(groups, scores, other)
            found = Search(groups, scopes, other, count.cost, {"macs": float(macs)}).find()
        except PlanError as error:  # the result of the stage does not depend on what it is held against
            progress.note(f"ranking {name} is not measured: {error.message}")
            continue
        copied = apart(model)
        cut(copied, groups, realise(groups, scores, found.widths, other), attn_scale=settings.attn_scale)
        measured[name] = {"loss": mean_loss(copied, objective, progress), "macs": copied.size().macs}
    return measured
