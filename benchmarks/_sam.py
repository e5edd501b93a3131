"""What the benchmark of SlimSAM compares with, and how it judges: other scores, masks, milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import torch
from _common import interleaved_minima
from compress.calibration.scene_sets import SceneSet
from compress.calibration.seeds import generator_for
from compress.calibration.segmenting import best_masks, embeddings, iou, random_points
from compress.compressors.pruning.sam.scores import Scores
from compress.compressors.pruning.sam.sites import encoder_sites
from compress.models.base import OpenModel
from torch import Tensor, nn

OtherScores = Literal["magnitude", "random"]
STAGE = "compress.compressors.pruning.sam.slimming"
SCORES = "compress.compressors.pruning.sam.scores"
POINTS = 8
"""Random points of an image at which the masks of two models are compared."""


@dataclass(frozen=True)
class Quality:
    """How a model does on images that nothing was decided on.

    Attributes:
        error: mean square between the embeddings of the original and of this model.
        agreement: mIoU of its masks with the original's at the same random points.
        miou: mIoU with the true masks, a point each.
    """

    error: float
    agreement: float
    miou: float


class Judge:
    """Held-out images, and what the original answers to them.

    Args:
        scenes: the images, with masks.
        original: the model as it was.
        seed: of the random points.
    """

    def __init__(self, scenes: SceneSet, original: nn.Module, seed: int) -> None:
        self._scenes = scenes
        self._embeddings: list[Tensor] = []
        self._points: list[Tensor] = []
        self._masks: list[Tensor] = []
        for index in range(len(scenes)):
            scene = scenes.scene(index)
            points = random_points(scene, POINTS, generator_for(seed, "points", index))
            embedding = embeddings(original, scene.pixels[None])[0]
            self._embeddings.append(embedding)
            self._points.append(points)
            self._masks.append(best_masks(original, embedding, scene, points)[0])

    def measure(self, module: nn.Module) -> Quality:
        """Return how a model does."""
        errors, agreements, overlaps = [], [], []
        for index in range(len(self._scenes)):
            scene, notes = self._scenes.scene(index), self._scenes.annotations(index)
            embedding = embeddings(module, scene.pixels[None])[0]
            errors.append((embedding - self._embeddings[index]).square().mean())
            masks = best_masks(module, embedding, scene, self._points[index])[0]
            agreements.append(iou(masks, self._masks[index]))
            found = best_masks(module, embedding, scene, torch.tensor([note.point for note in notes]))[0]
            overlaps.append(iou(found, torch.stack([torch.from_numpy(note.mask) for note in notes])))
        means = (torch.stack(errors), torch.cat(agreements), torch.cat(overlaps))
        return Quality(*(float(values.mean()) for values in means))


@contextmanager
def scored_by(kind: OtherScores | None, seed: int) -> Iterator[None]:
    """Let the stage choose by other scores than its own, of the same channels; None: by its own."""
    if kind is None:
        yield
    elif kind == "magnitude":
        with patch(f"{SCORES}.accumulate", _ones):
            yield
    else:
        with patch(f"{STAGE}.score", partial(_random, seed)):
            yield


def _ones(model: OpenModel, _: Any, names: Sequence[str], **__: Any) -> SimpleNamespace:
    """Return gradients of 1: |weight * gradient| is the weight's magnitude then."""
    return SimpleNamespace(sums={name: torch.ones_like(model.module.get_parameter(name)) for name in names})


def _random(seed: int, model: OpenModel, _: Any, *, embedding: bool, bottleneck: bool, **__: Any) -> Scores:
    sites, generator = encoder_sites(model.module), generator_for(seed, "random scores", embedding)
    layers = sites.layers if bottleneck else ()
    return Scores(
        torch.rand(sites.width, generator=generator) if embedding else None,
        tuple(torch.rand(layer.head_dim, generator=generator) for layer in layers),
        tuple(torch.rand(layer.inner, generator=generator) for layer in layers),
    )


def milliseconds(modules: Sequence[nn.Module], side: int, rounds: int) -> list[float]:
    """Return the shortest time of one image of `side` pixels through each encoder; they take turns."""
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    calls = [partial(embeddings, module, pixels) for module in modules]
    return [1000 * seconds for seconds in interleaved_minima(calls, rounds=rounds)]
