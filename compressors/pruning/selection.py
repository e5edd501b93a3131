"""From scores to what stays: totals per scope, widths per layer, channels.

Three steps that can be looked at one by one. `competition` says who competes and `scopes.rank` in which
order; `widths_at` gives every layer a width; `realise` picks the best channels of every layer. The last
step loses nothing: the best of a scope that lie in a layer are the best of that layer.

Follows the paper's code (arXiv 2407.04616) in the totals and in how heads and their channels are scored,
and differs where that goes wrong: a layer never falls to nothing nor is left whole because all of it lies
below the threshold, equal scores never remove more than was asked, heads do not depend on the share of
another kind, and widths of heads are rounded on the head, not on all heads together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...errors import PlanError
from ...recipes.pruning import IsomorphicSettings
from .competition import check_shares, competition
from .groups import Group, Selection
from .heads import best_of, by_dimension, by_head, heads_of, kept_of_attention
from .scopes import Scope, rank
from .widths import Widths

TotalOf = Callable[[Scope], int]


def select(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    settings: IsomorphicSettings,
    *,
    initial: Widths | None = None,
    scale: float = 1.0,
    rounding: bool = True,
) -> Selection:
    """Choose what stays, by the shares of the settings.

    Args:
        groups: of the model as it is now.
        scores: group -> [size] float, finite.
        settings: of the stage; its target is not looked at.
        initial: sizes before the first step of an iterative schedule; None: now.
        scale: the shares are multiplied by this.
        rounding: bring widths to multiples; not between the steps of a schedule.

    Raises:
        PlanError: see `competition` and `check_shares`; or nothing would be removed.
    """
    scopes = ranked(groups, scores, settings, initial)
    if scale == 1.0:
        check_shares(scopes)
    widths = widths_at(groups, scopes, settings, lambda scope: scope.total(scale), rounding=rounding)
    return realise(groups, scores, widths, settings)


def ranked(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    settings: IsomorphicSettings,
    initial: Widths | None = None,
) -> list[Scope]:
    """Return all scopes, their units in the order of the scores.

    Raises:
        PlanError: see `competition`.
    """
    by_name = {group.name: group for group in groups}
    return [
        rank(
            scope, {member.group: _of_unit(by_name[member.group], scope, scores) for member in scope.members}
        )
        for scope in competition(groups, settings, initial)
    ]


def _of_unit(group: Group, scope: Scope, scores: Mapping[str, Tensor]) -> Tensor:
    """Return the scores of a layer's units in one scope."""
    own = scores[group.name]
    if group.kind != "attention":
        return own
    return by_head(group, own) if scope.unit == "heads" else by_dimension(group, own)


def widths_at(
    groups: Sequence[Group],
    scopes: Sequence[Scope],
    settings: IsomorphicSettings,
    total_of: TotalOf,
    *,
    rounding: bool = True,
) -> Widths:
    """Return the size of every group when `total_of` says how many units of each scope stay.

    Args:
        groups: of the model as it is now.
        scopes: from `ranked`.
        settings: `rounding` is read.
        total_of: scope -> units before rounding.
        rounding: see `select`.
    """
    widths = Widths.of(groups)
    for scope in scopes:
        counts = scope.counts(total_of(scope))
        kept = scope.rounded(counts, settings.rounding) if rounding else counts
        for name, count in kept.items():
            widths = widths.with_size(name, scope.unit, count)
    return widths


def realise(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    widths: Widths,
    settings: IsomorphicSettings,
    *,
    required: bool = True,
) -> Selection:
    """Pick the best channels of every layer that loses some.

    Args:
        groups: of the model as it is now.
        scores: group -> [size] float.
        widths: what stays, from `widths_at`.
        settings: of the stage.
        required: something has to go; not so in every step of a schedule.

    Raises:
        PlanError: no layer loses anything, and something has to.
    """
    kept: dict[str, tuple[int, ...]] = {}
    heads: dict[str, tuple[int, ...]] = {}
    for group in groups:
        own = scores[group.name].detach().to("cpu", torch.float32)
        if group.kind == "attention":
            sizes = widths.heads[group.name], widths.head_dims[group.name]
            if sizes != heads_of(group):
                kept[group.name], heads[group.name] = kept_of_attention(group, own, *sizes, settings)
        elif widths.channels[group.name] != group.size:
            kept[group.name] = tuple(sorted(best_of(own, widths.channels[group.name])))
    if required and not kept:
        raise PlanError(
            "isomorphic: nothing would be removed",
            hint="ask for larger shares or a smaller target, or lower round_to",
        )
    return Selection(kept, heads, {group.name: group.size for group in groups if group.name in kept})


def compose(first: Selection, second: Selection) -> Selection:
    """Return what stays after `first` and then `second`, counted in the layout before both."""
    kept, heads, sizes = dict(first.kept), dict(first.heads), {**second.sizes, **first.sizes}
    for name, places in second.kept.items():
        before = first.kept.get(name)
        kept[name] = places if before is None else tuple(before[place] for place in places)
    for name, places in second.heads.items():
        before = first.heads.get(name)
        heads[name] = places if before is None else tuple(before[place] for place in places)
    return Selection(kept, heads, sizes)


def even_scores(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return scores that spread every share evenly over the layers: what a plan without data assumes."""
    return {group.name: _even(group) for group in groups}


def _even(group: Group) -> Tensor:
    if group.kind != "attention":
        return _falling(group.size)
    heads, head_dim = heads_of(group)
    return (_falling(heads)[:, None] + _falling(head_dim)).flatten()


def _falling(count: int) -> Tensor:
    """Return [count] numbers from 1 down to 0, equally far from each other and from both ends."""
    return 1.0 - (torch.arange(count, dtype=torch.float32) + 0.5) / count
