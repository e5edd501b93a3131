"""Who becomes a parent: the rules of 3 points, of 1 point and of the six best, with ties."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from compress.compressors.pruning.experts.selection import best, one_parent, parents, ranked, two_parents
from compress.recipes.experts import EepSettings

SETTINGS = EepSettings(keep_experts=4)


@dataclass(frozen=True)
class Scored:
    index: int
    fitness: float


def crafted(*fitness):
    return [Scored(index, value) for index, value in enumerate(fitness)]


@pytest.fixture
def generator():
    return np.random.default_rng(11450)


def drawn(records, generator, count=3000):
    return Counter(one_parent(records, SETTINGS, generator).index for _ in range(count))


def test_a_parent_is_within_three_points_of_the_best_and_all_of_these_are_equally_likely(generator):
    records = crafted(86.9, 90.0, 87.0, 90.0, 50.0, 88.5, 87.0, 86.9)
    counts = drawn(records, generator)
    assert set(counts) == {1, 2, 3, 5, 6}  # 87.0 is 3 points below the best, 86.9 is more
    sigma = (3000 * 0.2 * 0.8) ** 0.5
    assert all(abs(count - 600) < 4 * sigma for count in counts.values()), counts


def test_the_only_one_within_three_points_is_always_the_parent(generator):
    assert drawn(crafted(10.0, 90.0, 86.0), generator, 50) == {1: 50}


def test_two_parents_are_distinct_and_within_one_point(generator):
    records = crafted(*[89.0 + 0.125 * place for place in range(9)], 88.9, 88.0)
    counts: Counter[int] = Counter()
    for _ in range(2000):
        pair = two_parents(records, SETTINGS, generator)
        assert pair[0].index != pair[1].index
        counts.update(record.index for record in pair)
    assert set(counts) == set(range(9))
    sigma = (4000 / 9 * 8 / 9) ** 0.5
    assert all(abs(count - 4000 / 9) < 4 * sigma for count in counts.values()), counts


def test_either_of_two_parents_may_come_first(generator):
    pairs = Counter(
        tuple(record.index for record in two_parents(crafted(1.0, 2.0), SETTINGS, generator))
        for _ in range(200)
    )
    assert set(pairs) == {(0, 1), (1, 0)}


def test_the_six_best_can_be_two_parents_however_far_below(generator):
    records = crafted(90.0, 40.0, 50.0, 10.0, 60.0, 20.0, 30.0, 5.0)
    seen = {record.index for _ in range(500) for record in two_parents(records, SETTINGS, generator)}
    assert seen == {0, 1, 2, 4, 5, 6}


def test_of_ties_at_the_sixth_place_each_gets_its_turn(generator):
    records = crafted(90.0, 80.0, 80.0, 80.0, 80.0, 70.0, 70.0, 70.0, 60.0)
    seen: Counter[int] = Counter()
    for _ in range(3000):
        among = parents(ranked(records, generator), SETTINGS.cross_gap, SETTINGS.cross_rank)
        assert len(among) == 6
        seen.update(record.index for record in among if record.fitness == 70.0)
    assert set(seen) == {5, 6, 7}
    sigma = (3000 * (1 / 3) * (2 / 3)) ** 0.5
    assert all(abs(count - 1000) < 4 * sigma for count in seen.values()), seen


def test_ties_are_shuffled_at_every_sort_and_others_never(generator):
    records = crafted(1.0, 3.0, 3.0, 2.0, 3.0)
    orders = Counter(tuple(record.index for record in ranked(records, generator)) for _ in range(600))
    assert len(orders) == 6
    assert all(order[3:] == (3, 0) for order in orders)
    assert all(abs(count - 100) < 4 * (600 * (1 / 6) * (5 / 6)) ** 0.5 for count in orders.values())


def test_equal_seeds_rank_ties_alike():
    records = crafted(*[5.0] * 20)
    orders = [[record.index for record in ranked(records, np.random.default_rng(7))] for _ in range(2)]
    assert orders[0] == orders[1] != list(range(20))


def test_a_failed_model_is_the_last(generator):
    records = crafted(float("-inf"), 1.0, float("-inf"))
    assert drawn(records, generator, 30) == {1: 30}
    failed = crafted(float("-inf"), float("-inf"))
    assert set(drawn(failed, generator, 60)) == {0, 1}


def test_the_best_of_equal_ones_is_the_earlier():
    records = crafted(1.0, 3.0, 2.0, 3.0)
    assert [record.index for record in best(records, 3)] == [1, 3, 2]
    assert best(records)[0].index == 1
