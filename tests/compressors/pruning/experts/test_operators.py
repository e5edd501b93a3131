"""Operators: what a child may look like, and the rates at which it differs, within three standard errors."""

from __future__ import annotations

import numpy as np
import pytest
from compress.compressors.pruning.experts.genome import (
    Individual,
    Space,
    chosen,
    is_one_hot,
    random_choice,
)
from compress.compressors.pruning.experts.operators import (
    add_noise,
    cross_rows,
    divide_by_sums,
    draw_flags,
    swap_experts,
)
from compress.recipes.experts import EepSettings

SPACE = Space(groups=6, kept=4, experts=8)
SETTINGS = EepSettings(keep_experts=4)


def near(hits, trials, rate):
    """Tell whether so many hits are within three standard errors of a rate."""
    return abs(hits - trials * rate) <= 3 * (trials * rate * (1 - rate)) ** 0.5


@pytest.fixture
def generator():
    return np.random.default_rng(2407)


def real(generator, space=SPACE):
    """Return an individual of random numbers, all different."""
    draw = lambda: generator.standard_normal(space.shape).astype(np.float32)  # noqa: E731
    return Individual(draw(), draw())


@pytest.mark.parametrize("matrices", [1, 2])
def test_flags_are_redrawn_until_there_is_one(generator, matrices):
    groups, draws = 2, 4000
    flags = np.stack([draw_flags(groups, matrices, 0.25, generator) for _ in range(draws)])
    assert flags.shape == (draws, groups, matrices)
    assert flags.any(axis=(1, 2)).all()
    count = groups * matrices
    rate = 0.25 / (1 - 0.75**count)  # of one matrix, given that one at least is flagged
    for column in flags.reshape(draws, count).T:
        assert near(column.sum(), draws, rate)


def test_flags_of_many_groups_have_the_rate_that_is_set(generator):
    flags = np.stack([draw_flags(32, 2, 0.25, generator) for _ in range(500)])
    assert near(flags.sum(), flags.size, 0.25)


def test_exchanged_experts_stay_distinct_and_both_matrices_equal(generator):
    for pools in (1, 2):
        space = Space(groups=6, kept=4, experts=8, pools=pools)
        child = random_choice(space, generator)
        for _ in range(300):
            child = swap_experts(child, space, draw_flags(6, 1, 0.25, generator), 0.5, generator)
            assert child.is_choice
            choice = chosen(child.experts)
            assert ((choice < 4).sum(axis=1) == 2).all() or pools == 1


def test_experts_are_exchanged_at_the_rate_that_is_set_in_flagged_groups_only(generator):
    parent = random_choice(SPACE, generator)
    flags = np.array([[True], [False], [True], [False], [False], [True]])
    gone, draws = 0, 2000
    for _ in range(draws):
        child = chosen(swap_experts(parent, SPACE, flags, 0.15, generator).experts)
        for group, before in enumerate(chosen(parent.experts)):
            new = np.setdiff1d(child[group], before).size
            assert new == 0 or flags[group, 0]
            gone += new
    # A row that is hit takes an expert that no row of the group has. Rarely it is one that another row has
    # left just before: of two hit rows the second draws among 4 + 1, of which one is not new.
    trials = draws * int(flags.sum()) * SPACE.kept
    share = (
        sum(probability * expected_new(hits) for hits, probability in enumerate(binomial(SPACE.kept, 0.15)))
        / SPACE.kept
    )
    assert 0.14 < share < 0.15
    assert near(gone, trials, share)


def binomial(count, chance):
    from math import comb

    return [comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(count + 1)]


def expected_new(hits, unused=4, kept=4):
    """Return how many experts are new on average after so many rows were hit, one after the other."""
    states = {(kept, 0): 1.0}  # old experts still kept, old ones free to be drawn
    for _ in range(hits):
        following: dict[tuple[int, int], float] = {}
        for (old, free), probability in states.items():
            fresh = unused - (kept - old)  # never kept so far, or left again
            for drawn_old, weight in ((True, free), (False, fresh)):
                if weight:
                    key = (old - 1 + drawn_old, free + 1 - drawn_old)
                    following[key] = following.get(key, 0.0) + probability * weight / (free + fresh)
        states = following
    return sum(probability * (kept - old) for (old, _), probability in states.items())


def test_a_replaced_expert_is_another_one_of_all_unused(generator):
    space = Space(1, 1, 5)
    parent = random_choice(space, generator)
    old = int(chosen(parent.experts)[0, 0])
    counts = np.zeros(5)
    for _ in range(2000):
        child = swap_experts(parent, space, np.array([[True]]), 1.0, generator)
        counts[chosen(child.experts)[0, 0]] += 1
    assert counts[old] == 0
    assert all(near(count, 2000, 0.25) for expert, count in enumerate(counts) if expert != old)


def test_where_all_experts_of_a_pool_stay_none_is_replaced(generator):
    space = Space(1, 4, 4)
    parent = random_choice(space, generator)
    assert swap_experts(parent, space, np.array([[True]]), 1.0, generator).sha256 == parent.sha256


def test_noise_hits_entries_of_flagged_matrices_at_the_rate_and_size_that_are_set(generator):
    parent = real(generator)
    flags = np.zeros((6, 2), dtype=bool)
    flags[1, 0] = flags[4, 0] = flags[4, 1] = True
    hits, differences = 0, []
    draws = 400
    for _ in range(draws):
        child = add_noise(parent, flags, SETTINGS, generator)
        for matrix, (after, before) in enumerate(
            ((child.experts, parent.experts), (child.router, parent.router))
        ):
            for group in range(6):
                difference = after[group].astype(np.float64) - before[group]
                changed = difference[difference != 0]
                assert not changed.size or flags[group, matrix]
                hits += changed.size
                differences.extend(changed.tolist())
    assert near(hits, draws * 3 * SPACE.kept * SPACE.experts, 0.25)
    count = len(differences)
    sigma = SETTINGS.mut_sigma
    assert abs(np.mean(differences)) < 3 * sigma / count**0.5
    assert abs(np.std(differences) - 0.065) < 3 * sigma / (2 * count) ** 0.5


def test_noise_leaves_a_frozen_router(generator):
    parent = Individual(random_choice(SPACE, generator).router, real(generator).experts)
    child = add_noise(parent, np.ones((6, 1), dtype=bool), SETTINGS, generator)
    assert np.array_equal(child.router, parent.router)
    assert not np.array_equal(child.experts, parent.experts)


def test_two_parents_give_rows_of_flagged_matrices_and_the_others_whole(generator):
    first, second = real(generator), real(generator)
    flags = np.array(
        [[True, False], [False, True], [False, False], [True, True], [False, False], [False, False]]
    )
    rows_of_first = wholes_of_first = 0
    draws = 1500
    for _ in range(draws):
        child = cross_rows((first, second), flags, 0.6, generator)
        for matrix, name in enumerate(("experts", "router")):
            values = [getattr(individual, name) for individual in (child, first, second)]
            of_first = (values[0] == values[1]).all(axis=2)
            assert (of_first ^ (values[0] == values[2]).all(axis=2)).all()  # every row is one of the two
            for group in range(6):
                if flags[group, matrix]:
                    rows_of_first += of_first[group].sum()
                else:
                    assert of_first[group].all() or not of_first[group].any()
                    wholes_of_first += of_first[group, 0]
    assert near(rows_of_first, draws * flags.sum() * SPACE.kept, 0.6)
    assert near(wholes_of_first, draws * (~flags).sum(), 0.6)


def test_the_matrices_of_a_group_come_from_parents_drawn_apart(generator):
    first, second = real(generator), real(generator)
    apart = 0
    draws = 1500
    for _ in range(draws):
        child = cross_rows((first, second), np.zeros((6, 2), dtype=bool), 0.6, generator)
        experts = child.experts[:, 0, 0] == first.experts[:, 0, 0]
        apart += (experts != (child.router[:, 0, 0] == first.router[:, 0, 0])).sum()
    assert near(apart, draws * 6, 0.48)


def test_a_frozen_router_stays_one_hot_and_goes_with_its_experts(generator):
    first, second = (
        Individual(random_choice(SPACE, generator).router, real(generator).experts) for _ in range(2)
    )
    assert not (first.router == second.router).all(axis=(1, 2))[1:].any()  # else there is nothing to see
    flags = np.array([[True], [True], [True], [False], [False], [False]])
    for _ in range(300):
        child = cross_rows((first, second), flags, 0.6, generator)
        assert is_one_hot(child.router)
        assert np.array_equal(child.router[:3], first.router[:3])
        for group in range(3, 6):
            parent = first if np.array_equal(child.experts[group], first.experts[group]) else second
            assert np.array_equal(child.experts[group], parent.experts[group])
            assert np.array_equal(child.router[group], parent.router[group])


def test_sums_are_divided_by_in_the_merging_coefficients_only(generator):
    parent = real(generator)
    child = divide_by_sums(parent)
    assert np.array_equal(child.router, parent.router)
    sums = parent.experts.astype(np.float64).sum(axis=2, keepdims=True)
    assert np.allclose(child.experts, parent.experts / sums, rtol=1e-3)
    choice = random_choice(SPACE, generator)
    assert divide_by_sums(choice).sha256 == choice.sha256


def test_a_row_that_sums_to_nothing_stays():
    values = np.array([[[1.0, -1.0, 0.0], [2.0, 1.0, 1.0]]], dtype=np.float32)
    child = divide_by_sums(Individual(values, values))
    assert child.experts.tolist() == [[[1.0, -1.0, 0.0], [0.5, 0.25, 0.25]]]


def test_equal_seeds_give_equal_children():
    def family(seed):
        generator = np.random.default_rng(seed)
        first, second = random_choice(SPACE, generator), random_choice(SPACE, generator)
        flags = draw_flags(6, 2, 0.25, generator)
        swapped = swap_experts(first, SPACE, flags[:, :1], 0.9, generator)
        merged = add_noise(cross_rows((swapped, second), flags, 0.6, generator), flags, SETTINGS, generator)
        return [item.sha256 for item in (first, second, swapped, merged)]

    assert family(5) == family(5)
    assert family(5) != family(6)
