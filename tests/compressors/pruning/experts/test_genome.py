"""Individuals: what they look like, when two are one, how they are stored."""

from __future__ import annotations

import numpy as np
import pytest
from compress.compressors.pruning.experts.genome import (
    Individual,
    Space,
    chosen,
    from_arrays,
    given_choice,
    identity,
    individual_of,
    is_one_hot,
    one_hot,
    random_choice,
    to_arrays,
)
from compress.errors import PlanError

SPACE = Space(groups=3, kept=4, experts=8)


def test_the_identity_changes_nothing():
    found = identity(Space(2, 3, 3))
    assert np.array_equal(found.router, np.stack([np.eye(3)] * 2))
    assert np.array_equal(found.experts, found.router)
    assert found.is_choice


def test_random_choices_are_distinct_one_hot_rows_and_all_are_equally_likely():
    space, draws = Space(1, 2, 4), 6000
    generator = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        found = random_choice(space, generator)
        assert found.is_choice
        key = tuple(chosen(found.router)[0].tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == space.choices == 6
    sigma = (draws * (1 / 6) * (5 / 6)) ** 0.5
    assert all(abs(count - draws / 6) < 4 * sigma for count in counts.values()), counts


def test_a_pool_keeps_its_share():
    space = Space(groups=2, kept=4, experts=8, pools=2)
    generator = np.random.default_rng(1)
    for _ in range(50):
        choice = chosen(random_choice(space, generator).experts)
        assert ((choice < 4).sum(axis=1) == 2).all()
    assert space.choices == 6**4
    assert (space.pool(2), space.pool(5)) == (range(4), range(4, 8))


@pytest.mark.parametrize("arguments", [(1, 5, 4), (1, 0, 4), (0, 1, 4), (1, 3, 8, 2), (1, 3, 7, 2)])
def test_counts_that_do_not_fit_are_refused(arguments):
    with pytest.raises(PlanError):
        Space(*arguments)


def test_the_order_of_kept_experts_makes_no_other_individual():
    one = individual_of(np.array([[3, 0, 5]]), 8)
    other = individual_of(np.array([[5, 3, 0]]), 8)
    assert one.sha256 == other.sha256
    assert chosen(one.router).tolist() == [[0, 3, 5]]
    assert individual_of(np.array([[0, 3, 6]]), 8).sha256 != one.sha256


def test_an_individual_is_never_changed_by_what_it_was_made_of():
    values = one_hot(np.array([[0, 1]]), 4)
    found = Individual(values, values)
    before = found.sha256
    values[0, 0, 0] = 7.0
    assert Individual(found.router, found.experts).sha256 == before
    with pytest.raises(ValueError, match="read-only"):
        found.router[0, 0, 0] = 7.0


def test_negative_zero_is_zero():
    values = one_hot(np.array([[0, 1]]), 4)
    signed = np.where(values == 0, np.float32(-0.0), values)
    assert Individual(values, values).sha256 == Individual(signed, signed).sha256


@pytest.mark.parametrize(
    "values",
    [
        [[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]],  # one expert twice
        [[[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]],
        [[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]],
        [[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]],
        [[[2.0, -1.0, 0.0], [0.0, 0.0, 1.0]]],
    ],
)
def test_what_is_no_choice(values):
    array = np.array(values, dtype=np.float32)
    assert not is_one_hot(array)
    assert not Individual(array, array).is_choice


def test_a_choice_has_equal_matrices():
    router = one_hot(np.array([[0, 1]]), 4)
    assert not Individual(router, one_hot(np.array([[0, 2]]), 4)).is_choice


def test_given_choices():
    found = given_choice(SPACE, [[3, 2, 1, 0]] * 3, "frequency")
    assert chosen(found.router).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("kept", "space", "message"),
    [
        ([[0, 1, 2, 2]] * 3, SPACE, "of group 0 are not 4 of 8"),
        ([[0, 1, 2, 8]] * 3, SPACE, "of group 0 are not 4 of 8"),
        ([[0, 1, 2, -1]] * 3, SPACE, "of group 0 are not 4 of 8"),
        ([[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3]], SPACE, "of group 1 are not 4 of 8"),
        ([[0, 1, 2, 3]] * 2, SPACE, "2 groups of layers, not of 3"),
        ([[0, 1, 2, 4]] * 3, Space(3, 4, 8, pools=2), "equally many of each of the 2 groups"),
    ],
)
def test_given_choices_that_do_not_fit_are_refused(kept, space, message):
    with pytest.raises(PlanError, match=message) as caught:
        given_choice(space, kept, "naee")
    assert str(caught.value).startswith("naee: ")


def test_storing_brings_back_every_bit():
    generator = np.random.default_rng(2)
    choice = random_choice(SPACE, generator)
    noise = generator.standard_normal(SPACE.shape).astype(np.float32)
    frozen = Individual(choice.router, choice.experts + noise)
    free = Individual(choice.router - noise, choice.experts + noise)
    for individual, names in (
        (choice, {"choice"}),
        (frozen, {"router", "experts"}),
        (free, {"router", "experts"}),
    ):
        arrays = to_arrays(individual)
        assert set(arrays) == names
        again = from_arrays(arrays, SPACE)
        assert np.array_equal(again.router, individual.router)
        assert np.array_equal(again.experts, individual.experts)
        assert again.sha256 == individual.sha256
    assert to_arrays(frozen)["router"].shape == SPACE.shape[:2]  # the frozen router is stored as its choice


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"choice": np.zeros((3, 4), np.int64), "router": np.zeros(SPACE.shape, np.float32)},
        {"choice": np.full((3, 4), 8)},
        {"choice": np.full((3, 4), -1)},
        {"choice": np.zeros((3, 5), np.int64)},
        {"router": np.zeros((3, 4, 9), np.float32), "experts": np.zeros((3, 4, 9), np.float32)},
        {"router": np.zeros(SPACE.shape, np.float64), "experts": np.zeros(SPACE.shape, np.float64)},
    ],
)
def test_other_arrays_are_refused(arrays):
    with pytest.raises(ValueError):
        from_arrays(arrays, SPACE)
