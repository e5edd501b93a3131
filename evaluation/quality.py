"""Quality of samples by themselves: class agreement and Frechet distance, by the built-in scorer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.base import OpenModel
from ..models.builtin.classifier import Scorer
from .metrics import class_agreement, frechet_distance, moments


@dataclass(frozen=True)
class Scores:
    """What the scorer says about a set of samples.

    Attributes:
        agreement: fraction 0-1 of samples that are named as what was asked for.
        fid: Frechet distance of their features to those of the training images.
        per_class: fraction 0-1 per class, in class order; None for a class that was not asked for.
    """

    agreement: float
    fid: float
    per_class: tuple[float | None, ...]


def why_not(model: OpenModel, scorer: Scorer) -> str | None:
    """Tell why the scorer cannot judge a model's samples; None where it can."""
    config = model.config
    shape = (config.get("in_channels"), config.get("sample_size"), config.get("sample_size"))
    if shape != scorer.sample_shape:
        return (
            "quality was not measured: the built-in classifier judges samples of shape"
            f" {scorer.sample_shape}, this model makes {shape}"
        )
    if config.get("num_embeds_ada_norm") != scorer.classes:
        return (
            f"quality was not measured: the built-in classifier knows {scorer.classes} classes,"
            f" this model has {config.get('num_embeds_ada_norm')}"
        )
    return None


def balanced_classes(samples: int, classes: int) -> Tensor:
    """Return [samples] int64 labels that take every class in turn."""
    return torch.arange(samples) % classes


def judge(scorer: Scorer, images: Tensor, wanted: Tensor) -> Scores:
    """Score samples.

    Args:
        scorer: the built-in classifier with its reference statistics.
        images: [n, 1, 28, 28] float in about [-1, 1].
        wanted: [n] int64, the class that each sample was conditioned on.
    """
    predicted, features = scorer.score(images)
    per_class: list[float | None] = []
    for label in range(scorer.classes):
        asked = wanted == label
        per_class.append(class_agreement(predicted[asked], wanted[asked]) if bool(asked.any()) else None)
    return Scores(
        agreement=class_agreement(predicted, wanted),
        fid=frechet_distance(*moments(features), scorer.mean, scorer.covariance),
        per_class=tuple(per_class),
    )
