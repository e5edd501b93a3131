"""What every channel of a group is worth: Taylor and magnitude, as the official code computes them.

Isomorphic Pruning (arXiv 2407.04616) writes the importance of a sub-structure as the sum of norms of
gradient * weight over its operations. Its official code computes something else, which is what is done here:

- Of a tensor of several axes, the score of a position is the sum of |w * G| over the other axes, G the
  gradient summed over all samples; of a norm's scale it is |w * G| itself.
- The scores of all tensors of a group are brought to the group's channels and averaged over the tensors.
  Where a tensor holds a channel at several positions, these are added.
- The result is divided by its own mean (`normalizer: mean`).

Magnitude has w * w in place of |w * G|: the squared L2 norm, which is what torch-pruning's group magnitude
gives with its default p = 2.

Which tensors count is said by `Slice.scored`, for both criteria alike. Biases, depthwise convolutions, bare
parameters and batch norms do not: the official Taylor criterion passes over all of them. (Its magnitude does
count batch norms; no family here has any.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import StageError
from .gradients import Gradients
from .groups import Group, Slice

Importance = Literal["taylor", "magnitude"]
Normalizer = Literal["mean", "none"]


def scored_tensors(groups: Sequence[Group]) -> list[str]:
    """Return the names of all tensors that scores are read off, sorted."""
    return sorted({part.tensor for group in groups for part in group.slices if part.scored})


@torch.no_grad()
def scores(
    groups: Sequence[Group],
    module: nn.Module,
    gradients: Gradients | None,
    *,
    importance: Importance,
    normalizer: Normalizer,
) -> dict[str, Tensor]:
    """Score the channels of every group.

    Args:
        groups: of the module as it is now.
        module: with its weights.
        gradients: of `scored_tensors`; None for magnitude.
        importance: taylor or magnitude.
        normalizer: mean: divide by the group's own mean, unless that is 0; none: leave as it is.

    Returns:
        Name of the group -> [size] float32 on the CPU, not negative.

    Raises:
        StageError: a group has nothing that is scored, or a score is not finite.
        ValueError: taylor without gradients.
    """
    if importance == "taylor" and gradients is None:
        raise ValueError("taylor scores need gradients")
    known = dict(module.named_parameters(remove_duplicate=False))
    given = gradients if importance == "taylor" else None
    return {group.name: _of_group(group, known, given, normalizer) for group in groups}


def _of_group(
    group: Group, known: dict[str, nn.Parameter], gradients: Gradients | None, normalizer: Normalizer
) -> Tensor:
    counted = [part for part in group.slices if part.scored]
    if not counted:
        raise StageError(f"{group.name}: none of the tensors of its group is scored")
    total = torch.zeros(group.size, dtype=torch.float32)
    for part in counted:
        gradient = None if gradients is None else gradients.of(part.tensor)
        values = _of_slice(part, known[part.tensor], gradient)
        owned = part.owner >= 0
        total.scatter_add_(0, part.owner[owned], values[owned])
    total /= len(counted)
    if not bool(torch.isfinite(total).all()):
        raise StageError(
            f"{group.name}: the scores of its channels are not finite",
            hint="the weights or their gradients are too large for float32; look at this layer",
        )
    mean = total.mean()
    return total / mean if normalizer == "mean" and bool(mean > 0) else total


def _of_slice(part: Slice, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the score of every position along the axis, float32 on the CPU."""
    values = weight.detach().float()
    products = values * (values if gradient is None else gradient.to(values.device))
    others = [axis for axis in range(products.ndim) if axis != part.axis]
    products = products.abs_()
    return (products.sum(others) if others else products).cpu()
