"""How much stays, and which: published widths, exact counts, layers that compete, ties, refusals."""

import pytest
import torch
from compress.compressors.pruning.sam.choosing import (
    Widths,
    best,
    check_pool,
    choose,
    compete,
    kept_of,
    kept_width,
    normalized,
    widths_after,
)
from compress.compressors.pruning.sam.scores import Scores
from compress.compressors.pruning.sam.sites import encoder_sites
from compress.errors import PlanError, StageError
from compress.recipes.slimsam import SlimSamSettings

from ....tiny_sam import tiny_sam
from .learners import narrower

BASE = Widths(768, (64,) * 12, (3072,) * 12)
NORMALIZERS = ("gaussian", "mean", "max", "sum", "min_max")


def random_scores(sizes, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (spread * torch.randn(size, generator=generator, dtype=torch.float64)).exp() for size in sizes
    )


@pytest.mark.parametrize(
    ("ratio", "width", "head_dim", "inner"), [(0.5, 384, 32, 1536), (0.77, 168, 14, 696)]
)
def test_the_widths_of_the_paper(ratio, width, head_dim, inner):
    assert widths_after(BASE, 12, SlimSamSettings(ratio=ratio)) == Widths(
        width, (head_dim,) * 12, (inner,) * 12
    )
    for ranking in ("uniform", "global"):
        found = widths_after(BASE, 12, SlimSamSettings(ratio=ratio, ranking=ranking))
        assert all(size % 12 == 0 for size in (found.embedding, *found.inner))
        assert found.embedding == width


@pytest.mark.parametrize(
    ("round_to", "width", "head_dim", "inner"),
    [
        (None, 168, 14, 696),
        (1, 168, 14, 706),
        (5, 120, 10, 705),  # of 5 and 12 heads: multiples of 60
        (8, 168, 14, 704),  # of 24
        (16, 144, 12, 704),  # of 48
        (24, 168, 14, 696),
    ],
)
def test_what_the_heads_share_is_a_multiple_of_heads_whatever_is_asked(round_to, width, head_dim, inner):
    found = widths_after(BASE, 12, SlimSamSettings(ratio=0.77, round_to=round_to))
    assert found == Widths(width, (head_dim,) * 12, (inner,) * 12)
    assert found.embedding == 12 * found.head_dims[0]  # what the stock class builds


def test_counts_are_exact_where_floating_point_is_not():
    assert int(10 * (1 - 0.9)) == 0  # what the plain formula says
    assert kept_of(10, 0.9) == 1
    assert kept_of(100, 0.77) == 23
    assert kept_of(3072, 0.77) == 706
    assert [kept_of(768, ratio) for ratio in (0.5, 0.77, 1e-9)] == [384, 176, 767]
    assert kept_width(100, 0.77, 12, what="it") == 12


def test_a_ratio_always_removes_something():
    assert kept_width(768, 1e-9, 12, what="it") == 756


@pytest.mark.parametrize(
    ("settings", "place", "largest"),
    [
        ({"ratio": 0.99}, "the residual stream", "0.9843"),
        ({"ratio": 0.9, "round_to": 256}, "the residual stream", "no ratio"),
        ({"ratio": 0.8, "round_to": 64}, "the residual stream", "0.75"),
        ({"ratio": 0.99, "ranking": "global"}, "the residual stream", "0.9843"),
    ],
)
def test_a_ratio_that_leaves_less_than_a_unit_per_head_is_refused(settings, place, largest):
    with pytest.raises(PlanError, match=place) as caught:
        widths_after(BASE, 12, SlimSamSettings(**settings))
    assert largest in caught.value.hint
    if largest != "no ratio":
        widths_after(BASE, 12, SlimSamSettings(**{**settings, "ratio": float(largest)}))
        over = round(float(largest) + 1e-4, 4)
        with pytest.raises(PlanError):
            widths_after(BASE, 12, SlimSamSettings(**{**settings, "ratio": over}))


def test_the_layer_that_is_too_narrow_is_named():
    narrow = Widths(768, (64, 2), (3072, 3072))
    with pytest.raises(PlanError, match=r"layer 1: its 12 heads: of 24 channels a ratio of 0.6 leaves 9"):
        widths_after(narrow, 12, SlimSamSettings(ratio=0.6))
    narrow = Widths(768, (64, 64), (3072, 20))
    with pytest.raises(PlanError, match=r"layer 1: its feed-forward network"):
        widths_after(narrow, 12, SlimSamSettings(ratio=0.6))
    with pytest.raises(PlanError, match=r"feed-forward networks: of the 40 channels") as caught:
        widths_after(Widths(768, (64, 64), (20, 20)), 12, SlimSamSettings(ratio=0.6, ranking="global"))
    assert "0.4" in caught.value.hint
    check_pool((20, 20), 0.4, 12, what="it")


def test_the_best_stay_and_of_equals_the_first():
    scores = torch.tensor([3.0, 1.0, 5.0, 3.0, 0.0, 3.0])
    assert best(scores, 2).tolist() == [0, 2]
    assert best(scores, 3).tolist() == [0, 2, 3]
    assert best(torch.zeros(4), 2).tolist() == [0, 1]
    with pytest.raises(StageError, match="not finite"):
        best(torch.tensor([1.0, float("nan")]), 1)


def test_uniform_takes_the_best_of_every_layer():
    module = tiny_sam()
    scores = Scores(*random_scores([48]), random_scores([12] * 3, 1), random_scores([96] * 3, 2))
    kept = choose(scores, encoder_sites(module), SlimSamSettings(ratio=0.5))
    assert kept.embedding.dtype == torch.int64
    for values, chosen, count in zip(
        (scores.embedding, *scores.attention, *scores.inner),
        (kept.embedding, *kept.attention, *kept.inner),
        (24, 6, 6, 6, 48, 48, 48),
        strict=True,
    ):
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert len(chosen) == count
        gone = sorted(set(range(len(values))) - set(chosen.tolist()))
        assert values[chosen].min() > values[gone].max()


def test_only_what_was_scored_is_chosen():
    sites = encoder_sites(tiny_sam())
    kept = choose(Scores(*random_scores([48]), (), ()), sites, SlimSamSettings(ratio=0.5))
    assert len(kept.embedding) == 24
    assert kept.attention == kept.inner == ()
    scores = Scores(None, random_scores([12] * 3), random_scores([96] * 3))
    assert choose(scores, sites, SlimSamSettings(ratio=0.5)).embedding is None


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77, 0.9])
def test_a_pool_removes_its_target_within_one_rounding_a_layer(normalizer, ratio):
    sizes = (96, 60, 96, 132)
    scores = random_scores(sizes, 3, 2.0)
    exact = compete(scores, ratio, 1, normalizer)
    empty = sum(1 for count in exact if count == 1)  # a layer keeps one, whatever it scores
    assert kept_of(sum(sizes), ratio) <= sum(exact) <= kept_of(sum(sizes), ratio) + empty
    rounded = compete(scores, ratio, 12, normalizer)
    for plain, found, size in zip(exact, rounded, sizes, strict=True):
        assert found % 12 == 0
        assert plain <= found < plain + 12
        assert 12 <= found <= size
    assert sum(rounded) - sum(exact) < 12 * len(sizes)


def test_the_pool_is_the_threshold_over_all_layers():
    """Worked by hand: 12 scores, half of them go; divided by their means the second layer wins."""
    scores = (
        torch.tensor([8.0, 6.0, 4.0, 2.0], dtype=torch.float64),  # mean 5
        torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 7.0], dtype=torch.float64),  # mean 1
    )
    # By their means: 1.6 1.2 0.8 0.4 and 1 0 0 0 0 0 0 7: the best six are four of the first, two others.
    assert compete(scores, 0.5, 1, "mean") == (4, 2)
    assert compete(scores, 0.75, 1, "mean") == (2, 1)
    assert compete(scores, 0.75, 2, "mean") == (2, 2)
    # By their sums: 0.4 0.3 0.2 0.1 and 0.125 0 ... 0.875: of the best three, one is of the second.
    assert compete(scores, 0.75, 1, "sum") == (2, 1)
    assert compete(scores, 0.75, 1, "max") == (2, 1)


def test_what_rounding_spares_has_the_highest_scores():
    module = tiny_sam()
    inner = tuple(values.flip(0).contiguous() for values in random_scores([96] * 3, 4, 2.0))
    scores = Scores(None, random_scores([12] * 3), inner)
    settings = SlimSamSettings(ratio=0.6, ranking="global", round_to=16)
    kept = choose(scores, encoder_sites(module), settings)
    for values, chosen in zip(scores.inner, kept.inner, strict=True):
        assert len(chosen) % 16 == 0
        gone = sorted(set(range(96)) - set(chosen.tolist()))
        assert values[chosen].min() > values[gone].max()


def test_channels_of_heads_are_rounded_by_what_all_heads_make():
    module = tiny_sam()  # 4 heads
    scores = Scores(None, random_scores([12] * 3, 5, 2.0), random_scores([96] * 3))
    for round_to, multiple in ((None, 1), (6, 3), (8, 2), (1, 1)):
        settings = SlimSamSettings(ratio=0.6, ranking="global", round_to=round_to)
        kept = choose(scores, encoder_sites(module), settings)
        counts = [len(chosen) for chosen in kept.attention]
        assert all(count % multiple == 0 for count in counts)
        assert 14 <= sum(counts) <= 14 + 3 * (multiple - 1) + 2  # int(36 * 0.4); no layer is empty
    assert len({len(chosen) for chosen in kept.attention}) > 1


def test_no_layer_falls_to_nothing():
    scores = (torch.ones(12, dtype=torch.float64) * 1e-9, torch.ones(12, dtype=torch.float64))
    low = scores[0] * torch.linspace(1, 2, 12)
    assert compete((torch.zeros(12, dtype=torch.float64), scores[1]), 0.5, 1, "mean") == (1, 12)
    assert compete((torch.zeros(12, dtype=torch.float64), scores[1]), 0.5, 4, "mean") == (4, 12)
    assert min(compete((low, random_scores([12])[0]), 0.5, 1, "max")) >= 1


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_scaling_one_layer_changes_nothing(normalizer):
    scores = random_scores([96, 60, 96], 6, 2.0)
    for factor in (10.0, 1e-12, 1e12):
        scaled = (scores[0], scores[1] * factor, scores[2])
        assert compete(scaled, 0.5, 12, normalizer) == compete(scores, 0.5, 12, normalizer)
        assert torch.allclose(normalized(scaled[1], normalizer), normalized(scores[1], normalizer))


def test_normalizers_by_hand():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    by_hand = {
        "gaussian": (values - 3) / (14 / 4) ** 0.5, "mean": values / 3, "max": values / 6,
        "sum": values / 12, "min_max": (values - 1) / 5,
    }  # fmt: skip
    for name, expected in by_hand.items():
        assert torch.allclose(normalized(values, name), expected, rtol=1e-7)
        assert normalized(torch.zeros(3, dtype=torch.float64), name).tolist() == [0, 0, 0]
        assert torch.isfinite(normalized(values[:1], name)).all()


def test_the_normalizer_decides():
    scores = (random_scores([96], 7, 0.3)[0], random_scores([96], 8, 1.5)[0], random_scores([96], 9, 3.0)[0])
    found = {name: compete(scores, 0.7, 1, name) for name in NORMALIZERS}
    assert found["mean"] == found["sum"]  # layers of one size
    assert len(set(found.values())) == 4


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_the_second_phase_does_not_ask_the_ratio_of_the_stream_again(ranking):
    """A quarter of a quarter of 48 channels would be less than one for each of 4 heads."""
    module = narrower(tiny_sam(), 12)
    scores = Scores(None, random_scores([12] * 3), random_scores([96] * 3))
    kept = choose(scores, encoder_sites(module), SlimSamSettings(ratio=0.75, ranking=ranking))
    assert kept.embedding is None and sum(len(item) for item in kept.attention) == 9
    with pytest.raises(PlanError, match="the residual stream"):
        choose(Scores(*random_scores([12]), (), ()), encoder_sites(module), SlimSamSettings(ratio=0.75))
