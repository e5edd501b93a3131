"""Ways to state an allocation: shared choices, monotone losses, and the paper's averages and groups.

The formulas are those of MixDQ (arXiv 2405.17873) as its public code has them. They are kept for
fidelity: the programs of `allocation` need no average bits, no two-sided band and no sweep over shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from ..errors import PlanError
from .allocation_problem import Choice, Item


def share_choice(name: str, items: Sequence[Item]) -> Item:
    """Return one item for several that must take the same choice, as a fused q/k/v product.

    Losses and costs are added up label by label; tied tensors, which are stored once, must therefore
    carry their cost in one of the items only.

    Args:
        name: of the new item.
        items: one or more, in one group, with the same labels.

    Raises:
        PlanError: their groups or labels differ, or there are none.
    """
    if not items:
        raise PlanError(f"{name}: no items to share a choice")
    first = items[0]
    labels = [choice.label for choice in first.choices]
    for item in items:
        if item.group != first.group:
            raise PlanError(f"{name}: {first.name} and {item.name} share a choice but not a group")
        if sorted(choice.label for choice in item.choices) != sorted(labels):
            raise PlanError(
                f"{name}: {first.name} and {item.name} share a choice but have not the same ones",
                hint="offer the layers that are fused at run time the same choices",
            )
    shared = []
    for label in labels:
        parts = [choice for item in items for choice in item.choices if choice.label == label]
        keys = {key for part in parts for key in part.costs}
        costs = {key: sum(part.costs.get(key, 0) for part in parts) for key in sorted(keys)}
        shared.append(Choice(label, math.fsum(part.loss for part in parts), costs))
    members = tuple(member for item in items for member in item.members or (item.name,))
    return Item(name, tuple(shared), first.group, members)


@dataclass(frozen=True)
class LossChange:
    """A measured loss that `make_monotone` replaced."""

    item: str
    label: str
    measured: float
    used: float


def make_monotone(items: Sequence[Item], cost: str) -> tuple[list[Item], list[LossChange]]:
    """Replace every loss by the least among it and those of the item's cheaper choices.

    More bits do not hurt; where a measurement says so, it is noise (the logs published with arXiv
    2405.17873 hold a few such layers). Choices that cost exactly the same keep their own losses: they
    differ in kind.

    Args:
        items: with finite losses.
        cost: key of `Choice.costs` that orders the choices.

    Returns:
        The items, and what was changed, for the log.

    Raises:
        PlanError: a choice has no such cost or a loss that is not finite.
    """
    changed, changes = [], []
    for item in items:
        for choice in item.choices:
            if cost not in choice.costs:
                raise PlanError(f"{item.name}: choice {choice.label!r} has no cost {cost!r} to be ordered by")
            if not math.isfinite(choice.loss):
                raise PlanError(f"{item.name}: the loss of choice {choice.label!r} is {choice.loss}")
        choices = []
        for choice in item.choices:
            cheaper = [other.loss for other in item.choices if other.costs[cost] < choice.costs[cost]]
            used = min([choice.loss, *cheaper])
            if used != choice.loss:
                changes.append(LossChange(item.name, choice.label, choice.loss, used))
            choices.append(replace(choice, loss=used))
        changed.append(replace(item, choices=tuple(choices)))
    return changed, changes


def average_bits(bits: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Return sum_i b_i w_i / sum_i w_i, the average that the paper's file names state.

    Biases, scales and layers that stay in floating point are not counted, so it is not what a file
    takes: bits on disk are a budget in bytes.

    Args:
        bits: layer -> bits.
        sizes: layer -> number of weights (or of elements of the input, for activations).

    Raises:
        PlanError: the two do not name the same layers, or no layer has a weight.
    """
    if bits.keys() != sizes.keys():
        odd = min(bits.keys() ^ sizes.keys())
        raise PlanError(f"{odd}: has bits or a size, but not both")
    total = sum(sizes.values())
    if total <= 0:
        raise PlanError("no average: the layers have no weights")
    return float(sum(Fraction(bits[name]) * sizes[name] for name in sizes) / total)


def mean_bits_band(mean_bits: float, elements: int, half_width: float = 0.02) -> tuple[int, int]:
    """Return the paper's two-sided budget in bits, (at_least, limit), for a `Budget` whose cost is b_i w_i.

    (mean - .02) W <= sum_i b_i w_i <= (mean + .02) W. For fidelity only: the lower end excludes nothing
    good, and it makes the program slower.

    Args:
        mean_bits: the average asked for.
        elements: W, the sum of the w_i of the items that the budget covers.
        half_width: .02 in the paper's code; 0 with a one-sided budget gives the limit alone.
    """
    # Decimal fractions as they are written: 4.02 times a number of weights is otherwise one bit off.
    mean, half = Fraction(str(mean_bits)), Fraction(str(half_width))
    return max(0, math.ceil((mean - half) * elements)), math.floor((mean + half) * elements)


@dataclass(frozen=True)
class GroupMeans:
    """Average bits of the two groups of MixDQ.

    Attributes:
        content: layers that decide what the image shows (cross-attention, feed-forward).
        quality: all others.
        outside: why the paper's sweep skips this point, for the log; None where it does not.
    """

    content: float
    quality: float
    outside: str | None


def group_means(
    mean_bits: float,
    content_to_quality: float,
    size_quotient: float,
    *,
    content_range: tuple[float, float] = (2.0, 8.0),
    quality_range: tuple[float, float] = (4.0, 8.0),
) -> GroupMeans:
    """Split an average over the two groups, as arXiv 2405.17873's sweep does.

    mean_quality = mean (1 + r) / (k r + 1) and mean_content = k mean_quality, so that the average over
    both, (r mean_content + mean_quality) / (1 + r), is the mean.

    Args:
        mean_bits: average over both groups.
        content_to_quality: k, mean_content / mean_quality.
        size_quotient: r, elements of the content group / elements of the quality group.
        content_range: bits that the content group's choices can average.
        quality_range: likewise; its choices are 4 and 8 bits in the paper.

    Raises:
        PlanError: an argument is not positive.
    """
    if not (mean_bits > 0 and content_to_quality > 0 and size_quotient > 0):
        raise PlanError("average bits, k and r of two groups must be positive")
    quality = mean_bits * (1 + size_quotient) / (content_to_quality * size_quotient + 1)
    content = content_to_quality * quality
    outside = [
        f"{name} would average {mean:.3f} bits, outside {low:g} to {high:g}"
        for name, mean, (low, high) in (
            ("content", content, content_range),
            ("quality", quality, quality_range),
        )
        if not low <= mean <= high
    ]
    return GroupMeans(content, quality, "; ".join(outside) or None)
