"""The two losses of SlimSAM's aligning (arXiv 2312.05284), and the shares of their terms.

They follow the paper's formulas. The released code compares q, k, v of the student's global layers with
themselves, so that this term is 0 and teaches nothing; here they are compared with the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .features import squared_distance

Phase = Literal["embedding", "bottleneck", "outputs"]
"""What was pruned before an aligning; outputs: whatever it was, inner features are not compared."""


def epoch_of(step: int, batch_size: int, images: int) -> int:
    """Return in which pass over the images a step begins; both from 0."""
    return step * batch_size // images


def feature_share(phase: Phase, epoch: int, *, weight: float, epochs: int) -> float:
    """Return the share a of the features in the loss of an epoch.

    embedding: `weight` in the first `epochs` epochs, then 0. bottleneck: (N - n - 1) / N in epoch n of the
    first N = `epochs`, then 0; so it is 0 from the last of them on. outputs: 0.

    Args:
        phase: see `Phase`.
        epoch: from 0.
        weight: in [0, 1].
        epochs: at least 1.
    """
    if phase == "outputs" or epoch >= epochs:
        return 0.0
    return weight if phase == "embedding" else (epochs - epoch - 1) / epochs


def output_loss(output: Tensor, original: Tensor) -> Tensor:
    """Return the mean square between two embeddings [b, channels, s, s], a float32 scalar."""
    return squared_distance(output, original) / output.numel()


def embedding_loss(output: Tensor, original: Tensor, features: Mapping[str, Tensor], share: float) -> Tensor:
    """Return the loss after the embedding was pruned: (1 - a) * output + a * sum of the features' means.

    Args:
        output: of the student, [b, channels, s, s].
        original: of the original.
        features: group -> mean square between student and original, see `features.groups`; q, k, v of
            windowed and of global layers and inner channels have a mean each.
        share: a.
    """
    return _weighted([(1.0 - share, output_loss(output, original)), (share, _sum(list(features.values())))])


def bottleneck_loss(
    output: Tensor, original: Tensor, previous: Tensor, features: Mapping[str, Tensor], share: float
) -> Tensor:
    """Return the loss after the bottleneck was pruned.

    It is a * (mean over the features + output against the previous model) + (1 - a) * output against the
    original.

    Args:
        output: of the student, [b, channels, s, s].
        original: of the original.
        previous: of the model after the first aligning.
        features: group -> mean square between student and previous model; one group.
        share: a.
    """
    near = _sum([*features.values(), output_loss(output, previous)])
    return _weighted([(1.0 - share, output_loss(output, original)), (share, near)])


def _sum(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _weighted(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return a weighted sum; what weighs 0 gives no gradient, not one of 0 times infinity."""
    return torch.stack([weight * term for weight, term in terms if weight]).sum()
