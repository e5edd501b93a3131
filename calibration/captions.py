"""Captions that a text-conditional denoiser goes without while it is trained.

What guidance subtracts is the prediction for the empty prompt. A model that never sees that prompt while it
is trained forgets it, so its embeddings take the place of some captions, for a teacher beside it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.base import OpenModel
from ..progress import Progress
from ..runtime.hashes import digest
from ..runtime.tensor_hashes import tensors_sha256
from .conditions import embedding_keys, embeds_guidance
from .latents import LatentSet

DROP_RATE = 0.1
"""Share of the captions; what text-conditional denoisers are usually trained with."""


def with_empty_caption(
    model: OpenModel, data: LatentSet, guided: Mapping[str, Any] | None, progress: Progress
) -> LatentSet:
    """Return data that some captions of are dropped in training, where the empty prompt is known.

    Args:
        model: the denoiser.
        data: what it is trained on.
        guided: arguments of the denoiser that were recorded with guidance, the conditional half first;
            None: it was recorded without.
        progress: is told where no caption is dropped, and guidance might need it.
    """
    if model.family.name == "dit" or embeds_guidance(model):
        return data
    if guided is None:
        return _told(data, "the calibration has no guidance, and so no empty prompt", progress)
    empty: dict[str, Tensor] = {}
    given = data.conditions([0])
    for name, key in embedding_keys(model).items():
        second = guided[name][len(guided[name]) // 2 :]
        if not bool((second == second[:1]).all()):
            return _told(data, f"the calibration has several negative {key}, and no empty prompt", progress)
        if second.shape[1:] != given[name].shape[1:]:
            shapes = f"{list(second.shape[1:])} in the calibration, {list(given[name].shape[1:])} in the data"
            return _told(data, f"the empty prompt's {key} has another shape ({shapes})", progress)
        empty[name] = second[:1].contiguous()
    return replace(data, empty=empty, key=digest([data.key, "captions", DROP_RATE, tensors_sha256(empty)]))


def _told(data: LatentSet, why: str, progress: Progress) -> LatentSet:
    progress.note(f"no caption is dropped in training: {why}; what guidance subtracts may get worse")
    return data


def without_captions(
    conditions: Mapping[str, Any], empty: Mapping[str, Tensor], dropped: Tensor
) -> dict[str, Any]:
    """Return conditions with the empty caption in some rows.

    Args:
        conditions: keyword arguments of the denoiser, b rows each.
        empty: argument -> [1, ...], of the empty prompt.
        dropped: [b] in [0, 1), uniform: captions go where this is below `DROP_RATE`.
    """
    found = dict(conditions)
    for name, values in empty.items():
        rows = (dropped < DROP_RATE).view(-1, *(1 for _ in values.shape[1:]))
        found[name] = torch.where(rows, values.to(found[name].dtype), found[name])
    return found
