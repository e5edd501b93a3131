"""From shares to ranks: the published rule, exact decimals, refusals, and dealing out under a budget."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from compress.compressors.kv_cache.ranks import dealt_out, removed_shares, scheme_of, uniform_ranks
from compress.errors import PlanError
from compress.runtime.kv.support import KvAttention

from .conftest import settings


def sites(count=2, kv_heads=4, head_dim=8, hidden=64):
    return [KvAttention(f"layers.{i}.self_attn", hidden, kv_heads, head_dim) for i in range(count)]


def ranks_of(**keys):
    shape = {key: keys.pop(key) for key in ("kv_heads", "head_dim") if key in keys}
    (found,) = uniform_ranks(sites(1, **shape), settings(**keys)).values()
    return found


@pytest.mark.parametrize(
    ("removed", "rank", "true_share"),
    [(0.8, 25, 0.8046875), (0.7, 38, 0.703125), (0.6, 51, 0.6015625), (0.5, 64, 0.5)],
)
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_the_published_rule(kv_heads, removed, rank, true_share):
    keys = {"removed": {"k": removed, "v": removed}}
    attention = sites(3, kv_heads, 128, 4096)
    ranks = uniform_ranks(attention, settings(**keys))
    assert set(ranks.values()) == {(kv_heads * rank, kv_heads * rank)}
    shares = removed_shares(scheme_of(attention, ranks, settings(**keys)))
    assert shares == {"k": pytest.approx(true_share), "v": pytest.approx(true_share)}


def test_shares_are_the_decimals_that_are_written():
    # In binary (1 - 0.9) * 20 is 1.9999999999999996, and (1 - 0.8) * 5 is 0.9999999999999998.
    assert ranks_of(removed={"k": 0.9, "v": 0.9}, kv_heads=1, head_dim=20) == (2, 2)
    assert ranks_of(removed={"k": 0.8, "v": 0.8}, kv_heads=3, head_dim=5) == (3, 3)


def test_keys_and_values_have_their_own():
    assert ranks_of(removed={"k": 0.75, "v": 0.25}) == (8, 24)
    assert ranks_of(removed=0.5) == (12, 20)
    assert ranks_of(removed={"k": 0.8, "v": 0.0}, ranks="channels") == (6, 32)
    assert ranks_of(removed=0, bits=4) == (32, 32)


def test_channels_are_finer_than_heads():
    assert ranks_of(removed={"k": 0.8, "v": 0.8}) == (4, 4)  # one of the 8 channels of each head
    assert ranks_of(removed={"k": 0.8, "v": 0.8}, ranks="channels") == (6, 6)


@pytest.mark.parametrize(
    ("keys", "side", "hint"),
    [
        ({"removed": {"k": 0.9, "v": 0.5}}, "keys", "write `removed.k: 0.875` or less or `ranks: channels`"),
        ({"removed": {"k": 0.5, "v": 0.99}}, "values", "write `removed.v: 0.875` or less"),
        ({"removed": 0.9}, "keys", "write `removed: 0.8333` or less"),
        (
            {"removed": {"k": 0.99, "v": 0.5}, "ranks": "channels"},
            "keys",
            "write `removed.k: 0.9687` or less",
        ),
    ],
)
def test_a_share_that_leaves_nothing_is_refused_with_the_largest_that_does(keys, side, hint):
    with pytest.raises(PlanError) as caught:
        ranks_of(**keys)
    assert caught.value.message.startswith("layers.0.self_attn: removing ")
    assert f"of the {side} leaves no channel of" in caught.value.message
    assert caught.value.hint.startswith(hint)
    asked, written = keys["removed"], float(hint.split("`")[1].split(": ")[1])
    fixed = {**asked, side[0]: written} if isinstance(asked, dict) else written
    assert min(ranks_of(**{**keys, "removed": fixed})) >= 1


def test_a_scheme_says_what_is_asked():
    attention = sites(1)
    found = scheme_of(attention, {attention[0].name: (8, 10)}, settings(bits=4, window=7, key_group=16))
    assert (found.window, found.mode, found.bits, found.key_group) == (7, "sliding", 4, 16)
    layer = found.layers[attention[0].name]
    assert (layer.hidden, layer.width, layer.rank_k, layer.rank_v, layer.value_group) == (64, 32, 8, 10, 3)
    block = scheme_of(attention, {attention[0].name: (8, 8)}, settings(mode="block", bits=2, window=48))
    assert (block.window, block.mode, block.key_group) == (48, "block", 48)
    assert block.layers[attention[0].name].value_group == 2  # a head's part, as published


def curves(count, width):
    """Return lost shares of spectra that fall at different rates, as layers' do."""
    found = {}
    for index in range(count):
        rates = (0.02 * 3 ** (index % 5), 0.3 / (1 + index % 4))
        sides = []
        for rate in rates:
            variances = torch.exp(-rate * torch.arange(width))
            below = variances.flip(0).cumsum(0).flip(0) / variances.sum()
            sides.append([*below[1:].tolist(), 0.0])
        found[f"layers.{index}.self_attn"] = (sides[0], sides[1])
    return found


def test_dealt_out_ranks_are_the_best_within_the_budget():
    attention, lost = sites(2, 1, 5), curves(2, 5)
    ranks, allocation = dealt_out(attention, settings(removed=0.4), lost)
    budgets = (2 * 2, 2 * 3)  # int(0.45 * 5) of keys and int(0.75 * 5) of values, each of two layers
    best = min(
        sum(
            lost[site.name][side][choice[2 * i + side] - 1]
            for i, site in enumerate(attention)
            for side in (0, 1)
        )
        for choice in itertools.product(range(1, 6), repeat=4)
        if sum(choice[::2]) <= budgets[0] and sum(choice[1::2]) <= budgets[1]
    )
    assert tuple(map(sum, zip(*ranks.values(), strict=True))) == budgets
    assert allocation.loss == pytest.approx(best, abs=1e-12)
    assert allocation.gap == pytest.approx(0.0, abs=1e-9)


def test_keys_and_values_have_a_budget_each():
    attention, lost = sites(4), curves(4, 32)
    keys = {"removed": {"k": 0.75, "v": 0.5}, "allocate": "energy"}
    ranks, _ = dealt_out(attention, settings(**keys), lost)
    assert sum(rank_k for rank_k, _ in ranks.values()) == 4 * 8
    assert sum(rank_v for _, rank_v in ranks.values()) == 4 * 16
    assert len({rank_k for rank_k, _ in ranks.values()}) > 1
    assert all(rank % 4 == 0 for pair in ranks.values() for rank in pair)  # a whole number of each head
    finer, _ = dealt_out(attention, settings(ranks="channels", **keys), lost)
    assert any(rank % 4 for pair in finer.values() for rank in pair)
    assert sum(rank_k for rank_k, _ in finer.values()) == 4 * 8


def test_a_large_model_is_dealt_out_quickly():
    began = time.process_time()
    attention, lost = sites(32, 8, 128, 4096), curves(32, 1024)
    ranks, allocation = dealt_out(attention, settings(removed=0.8), lost)
    assert sum(map(sum, ranks.values())) == 32 * 8 * (19 + 32)
    assert allocation.stopped in ("optimal", "gap")
    assert time.process_time() - began < 20
