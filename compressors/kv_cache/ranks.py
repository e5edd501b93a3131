"""From shares to ranks: equal ones for all attentions, or dealt out under one budget by what they lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from ...errors import PlanError
from ...recipes.kv_cache import CskvSettings
from ...runtime.kv.scheme import KvCacheScheme, KvLayer
from ...runtime.kv.support import KvAttention
from ..allocation import Allocation, Budget, Choice, Item, allocate

SIDES = ("k", "v")
Ranks = dict[str, tuple[int, int]]
"""Attention -> ranks of its keys and values."""
_NODES = 10_000  # of HiGHS's tree: unlike a limit of time it gives the same ranks on any machine
_TIME_LIMIT_SECONDS = 600.0


def step_of(site: KvAttention, settings: CskvSettings) -> int:
    """Return what the ranks of an attention are multiples of."""
    return site.kv_heads if settings.ranks == "heads" else 1


def uniform_ranks(sites: Sequence[KvAttention], settings: CskvSettings) -> Ranks:
    """Return the ranks that the shares give every attention: kv_heads * int(kept * head_dim), as published.

    With `ranks: channels` int(kept * h_kv).

    Raises:
        PlanError: a share leaves no channel; it names the attention and the largest share that leaves one.
    """
    return {
        site.name: (
            _rank(site, settings, "k", settings.kept[0]),
            _rank(site, settings, "v", settings.kept[1]),
        )
        for site in sites
    }


def _rank(site: KvAttention, settings: CskvSettings, side: str, kept: Fraction) -> int:
    channels = site.width // step_of(site, settings)
    rank = step_of(site, settings) * int(kept * channels)
    if rank >= 1:
        return rank
    of = f"the {site.head_dim} of a head" if settings.ranks == "heads" else f"{site.width}"
    what = "keys" if side == "k" else "values"
    raise PlanError(
        f"{site.name}: removing {float(1 - kept):g} of the {what} leaves no channel of {of}",
        hint=_hint(site, settings, side, channels),
    )


def _hint(site: KvAttention, settings: CskvSettings, side: str, channels: int) -> str:
    if settings.is_total:
        part = settings.kept[0] / sum(settings.kept) if side == "k" else settings.kept[1] / sum(settings.kept)
        most = 1 - 1 / (2 * part * channels)
        key = "removed"
    else:
        most, key = 1 - Fraction(1, channels), f"removed.{side}"
    # Rounded down, so that what is written does leave a channel.
    written = max(0, int(most * 10_000)) / 10_000
    finer = " or `ranks: channels`" if settings.ranks == "heads" and site.kv_heads > 1 else ""
    return f"write `{key}: {written:g}` or less{finer}"


def dealt_out(
    sites: Sequence[KvAttention],
    settings: CskvSettings,
    lost: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> tuple[Ranks, Allocation]:
    """Return ranks whose sum is at most that of equal ones, with the least sum of lost shares of variance.

    A share counts alike whatever the variance of its layer is: plain sums of squares would give nearly all
    channels to the layers with the largest activations, which hurts. Keys and values have a budget each, for
    their shares do not compare: few directions hold nearly all of the keys' variance, and with one budget
    keys would get so few channels that the loss rises.

    Args:
        sites: the attentions.
        settings: of the stage.
        lost: attention -> of keys and of values, the lost share (0-1) of every rank from 1 to h_kv.

    Raises:
        PlanError: see `uniform_ranks`.
    """
    equal = uniform_ranks(sites, settings)
    budgets = [
        Budget(
            f"channels of {side}",
            sum(pair[index] for pair in equal.values()),
            "channels",
            (side,),
            unit="channels",
        )
        for index, side in enumerate(SIDES)
    ]
    items = [
        Item(f"{site.name}.{side}", tuple(_choices(site, settings, lost[site.name][index])), side)
        for site in sites
        for index, side in enumerate(SIDES)
    ]
    found = allocate(items, budgets, time_limit=_TIME_LIMIT_SECONDS, node_limit=_NODES)
    ranks = {
        site.name: (int(found.choices[f"{site.name}.k"]), int(found.choices[f"{site.name}.v"]))
        for site in sites
    }
    return ranks, found


def _choices(site: KvAttention, settings: CskvSettings, lost: Sequence[float]) -> list[Choice]:
    step = step_of(site, settings)
    return [
        Choice(str(rank), lost[rank - 1], {"channels": rank}) for rank in range(step, site.width + 1, step)
    ]


def scheme_of(sites: Sequence[KvAttention], ranks: Ranks, settings: CskvSettings) -> KvCacheScheme:
    """Return what is stored of a cache of these ranks.

    A scale is shared by a head's part of a value's channels, as published; where heads have no equal parts,
    by as many channels as the largest of them.
    """
    layers = {}
    for site in sites:
        rank_k, rank_v = ranks[site.name]
        group = -(-rank_v // site.kv_heads)
        layers[site.name] = KvLayer(
            hidden=site.hidden, width=site.width, rank_k=rank_k, rank_v=rank_v, value_group=group
        )
    return KvCacheScheme(
        layers=layers, window=settings.window, mode=settings.mode, bits=settings.bits,
        key_group=settings.tokens_per_scale,
    )  # fmt: skip


def removed_shares(scheme: KvCacheScheme) -> dict[str, float]:
    """Return the shares of the channels of keys and of values that a cache does without, 0-1."""
    width = sum(layer.width for layer in scheme.layers.values())
    return {
        "k": 1 - sum(layer.rank_k for layer in scheme.layers.values()) / width,
        "v": 1 - sum(layer.rank_v for layer in scheme.layers.values()) / width,
    }
