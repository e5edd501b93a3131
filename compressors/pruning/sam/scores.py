"""What every channel of the encoder is worth: the disturbed Taylor scores of SlimSAM (arXiv 2312.05284).

The loss is MSE(t + n, t'): t the embedding of the model as it is, without gradient, n noise, t' the same
embedding with gradient. Without noise the loss is at its least and every gradient is 0; with it, the
gradient towards t' is n itself up to a factor, so the scores are proportional to the deviation of the noise,
and the order of the channels does not depend on it. No labels are needed.

As in the official code: noise is drawn anew for every image; gradients are summed over all images before
the absolute value is taken of weight * gradient (`summed`; `per_image` takes it before summing); a channel's
score in a tensor is the sum over the other axes; the score of a channel is the mean over the tensors that
have it, queries, keys and values counting as three; biases, norms and positions do not count.

Here t is t' without its gradient, not a second pass: they are equal to the bit, and half the work is saved.
The difference t' - t is taken before the noise is added, so that rounding does not depend on the noise
either. Sums run in float32: a sum of n independent terms of either sign is off by about sqrt(n) roundings of
6e-8, 2e-6 for the 1000 images of the paper, and scores of channels lie further apart than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ....calibration.precision import computing_in
from ....calibration.scenes import Scenes
from ....calibration.seeds import generator_for
from ....errors import StageError
from ....models.base import OpenModel
from ....progress import Progress
from ....runtime.hashes import digest
from ..gradients import accumulate
from .recomputing import recomputing
from .sites import ENCODER, NECK, PATCHES, EncoderSites, LayerSites, encoder_sites

GradientSum = Literal["summed", "per_image"]
Worth = Callable[[str], Tensor]
"""Name of a linear or convolution -> |weight * gradient| of each of its weights."""

_VERSION = 1
"""Raise it when the same settings would give other sums."""
_HINT = "raise `sigma` (0.01 is published), or look at the checkpoint: its embedding may not depend on images"


@dataclass(frozen=True, eq=False)
class Scores:
    """One score per channel, float64 on the CPU, not negative; higher is worth more.

    Attributes:
        embedding: [width] of the residual stream; None where it was not asked for.
        attention: per layer [head_dim] of the channels within a head, summed over its heads; empty where the
            bottleneck was not asked for.
        inner: per layer [inner] of the feed-forward network; empty likewise.
    """

    embedding: Tensor | None
    attention: tuple[Tensor, ...]
    inner: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class DisturbedTaylor:
    """The loss whose gradients are summed: an `Objective` over images, one by one.

    Attributes:
        scenes: the images.
        sigma: deviation of the noise.
        seed: of the run; the noise of an image depends on it and on the image's place.
    """

    scenes: Scenes
    sigma: float
    seed: int

    @property
    def key(self) -> str:
        """Content hash of the images and the noise."""
        return digest(["disturbed taylor", _VERSION, self.scenes.key, self.samples, self.sigma, self.seed])

    @property
    def samples(self) -> int:
        """How many images there are."""
        return len(self.scenes)

    @property
    def parts(self) -> int:
        """As many: an image is a part."""
        return len(self.scenes)

    def losses(self, model: OpenModel, start: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (loss, 1) image by image; see `Objective.losses`."""
        encoder = model.module.get_submodule(ENCODER)
        device = next(encoder.parameters()).device
        for index in range(start, self.parts):
            student = encoder(self.scenes.pixels([index]).to(device)).last_hidden_state.float()
            noise = torch.randn(tuple(student.shape), generator=generator_for(self.seed, "noise", index))
            apart = student - student.detach()
            yield (self.sigma * noise.to(device) - apart).square().mean(), 1


def score(
    model: OpenModel,
    objective: DisturbedTaylor,
    *,
    embedding: bool,
    bottleneck: bool,
    gradients: GradientSum,
    recompute: bool,
    folder: Path | None,
    progress: Progress,
    save_every_seconds: float = 60.0,
) -> Scores:
    """Score the channels of a model's encoder.

    Only the weights that are scored get gradients, in float32, and each gradient is added to its sum as soon
    as it is there: beside the model, and one image's activations, stands one float32 copy of these weights.

    Args:
        model: with its weights, as it is now; nothing of it changes.
        objective: images and noise.
        embedding: score the residual stream.
        bottleneck: score the channels of heads and of feed-forward networks.
        gradients: summed or per_image.
        recompute: compute layers again on the way back instead of keeping their activations.
        folder: where the sums so far are kept, from which a killed run goes on to equal bytes; None: nowhere.
        progress: sees a unit for each image.
        save_every_seconds: time between two writings; more where writing is slow.

    Raises:
        StageError: there are no images, something is not finite, or all scores of the residual stream, of
            heads or of feed-forward networks are 0: then nothing may be removed.
    """
    sites = encoder_sites(model.module)
    names = [f"{name}.weight" for name in scored(sites, embedding=embedding)]
    with ExitStack() as stack:
        # Half precision has too few digits for gradients that are summed over a thousand images.
        encoder = model.module.get_submodule(ENCODER)
        stack.enter_context(computing_in(encoder, torch.float32))
        if recompute:
            stack.enter_context(recomputing(encoder))
        found = accumulate(
            model, objective, names, absolute=gradients == "per_image", zero_hint=_HINT,
            folder=folder, progress=progress, save_every_seconds=save_every_seconds,
        )  # fmt: skip
        worth = _worth(model.module, found.sums, absolute=gradients == "per_image")
        scores = Scores(
            _embedding_score(sites, worth) if embedding else None,
            tuple(_attention_score(layer, worth) for layer in sites.layers) if bottleneck else (),
            tuple(_inner_score(layer, worth) for layer in sites.layers) if bottleneck else (),
        )
    _refuse_zeros(scores)
    return scores


def scored(sites: EncoderSites, *, embedding: bool) -> Iterator[str]:
    """Yield the names of the linears and convolutions whose weights are scored.

    Args:
        sites: of the encoder.
        embedding: whether the residual stream is scored.
    """
    for layer in sites.layers:
        yield from (layer.qkv, layer.proj, layer.lin1, layer.lin2)
    if embedding:
        yield from (PATCHES, NECK)


def _worth(module: nn.Module, sums: Mapping[str, Tensor], *, absolute: bool) -> Worth:
    @torch.no_grad()
    def worth(name: str) -> Tensor:
        total = sums[f"{name}.weight"]
        if absolute:
            return total
        return (total * module.get_submodule(name).get_parameter("weight")).abs()

    return worth


def _over(worth: Tensor, *kept: int) -> Tensor:
    """Sum over all axes but one, or but some that stay in their order; float64."""
    others = [axis for axis in range(worth.ndim) if axis not in kept]
    return worth.sum(others, dtype=torch.float64) if others else worth.double()


def _embedding_score(sites: EncoderSites, worth: Worth) -> Tensor:
    total = _over(worth(PATCHES), 0) + _over(worth(NECK), 1)
    for layer in sites.layers:
        total += _over(worth(layer.qkv), 1) + _over(worth(layer.lin1), 1)
        total += _over(worth(layer.proj), 0) + _over(worth(layer.lin2), 0)
    return (total / (2 + 6 * len(sites.layers))).cpu()


def _attention_score(layer: LayerSites, worth: Worth) -> Tensor:
    rows = worth(layer.qkv).unflatten(0, (3, layer.heads, layer.head_dim))
    columns = worth(layer.proj).unflatten(1, (layer.heads, layer.head_dim))
    return ((_over(rows, 2) + _over(columns, 2)) / 4).cpu()


def _inner_score(layer: LayerSites, worth: Worth) -> Tensor:
    return ((_over(worth(layer.lin1), 0) + _over(worth(layer.lin2), 1)) / 2).cpu()


def _refuse_zeros(scores: Scores) -> None:
    residual = () if scores.embedding is None else (scores.embedding,)
    kinds = {"the residual stream": residual, "heads": scores.attention, "inner layers": scores.inner}
    for name, found in kinds.items():
        if found and not any(bool(values.any()) for values in found):
            raise StageError(
                f"the scores of all channels of {name} are 0, so nothing tells which may go", hint=_HINT
            )
