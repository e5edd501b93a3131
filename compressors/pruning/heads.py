"""Scores of heads and of their channels, from those of an attention's channels, and what is kept.

Both are read off the layout before the cut, as the official code does (arXiv 2407.04616).
"""

from __future__ import annotations

from torch import Tensor

from ...recipes.pruning import IsomorphicSettings
from .groups import Group


def heads_of(group: Group) -> tuple[int, int]:
    """Return (heads, channels of a head) of an attention as it is now.

    Raises:
        ValueError: the group is no attention, or its size is not what its attention says.
    """
    site = group.attention
    if site is None or site.heads * site.head_dim != group.size:
        raise ValueError(f"{group.name}: {group.size} channels are not those of an attention's heads")
    return site.heads, site.head_dim


def by_head(group: Group, scores: Tensor) -> Tensor:
    """Return the scores of heads, [heads]: of each the mean over its channels."""
    return scores.reshape(heads_of(group)).mean(dim=1)


def by_dimension(group: Group, scores: Tensor) -> Tensor:
    """Return the scores of channel positions, [head_dim]: of each the mean over all heads."""
    return scores.reshape(heads_of(group)).mean(dim=0)


def kept_of_attention(
    group: Group, scores: Tensor, heads: int, head_dim: int, settings: IsomorphicSettings
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose what stays of one attention, given how much.

    Args:
        group: the attention.
        scores: [size of the group].
        heads: how many stay.
        head_dim: how many channels each of them keeps.
        settings: `head_dim_mode` says whether every head keeps its own best channels (the paper's reference
            class) or all heads the same positions.

    Returns:
        (channels, heads) that stay, ascending; channels counted in the whole group.
    """
    _, width = heads_of(group)
    table = scores.reshape(heads_of(group))
    best = sorted(best_of(by_head(group, scores), heads))
    shared = best_of(by_dimension(group, scores), head_dim)
    channels: list[int] = []
    for head in best:
        own = best_of(table[head], head_dim) if settings.head_dim_mode == "per_head" else shared
        channels += [head * width + position for position in sorted(own)]
    return tuple(channels), tuple(best)


def best_of(scores: Tensor, count: int) -> list[int]:
    """Return the positions of the `count` highest of [n] scores; of equal ones the first."""
    chosen: list[int] = scores.argsort(descending=True, stable=True)[:count].tolist()
    return chosen
