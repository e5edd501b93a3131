"""Free routers rounded to a choice of experts."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from compress.compressors.pruning.experts.genome import (
    Individual,
    Space,
    chosen,
    individual_of,
    is_one_hot,
    random_choice,
)
from compress.compressors.pruning.experts.projection import project


def _individual(router: np.ndarray, seed: int = 5) -> Individual:
    experts = np.random.default_rng(seed).normal(size=router.shape)
    return Individual(router.astype(np.float32), experts.astype(np.float32))


def _best(rows: np.ndarray, pools: int = 1) -> float:
    """Return the largest sum of any allowed assignment, by trying all of them."""
    kept, experts = rows.shape
    size = experts // pools
    return max(
        sum(rows[row, expert] for row, expert in enumerate(picked))
        for picked in permutations(range(experts), kept)
        if {sum(expert // size == pool for expert in picked) for pool in range(pools)} == {kept // pools}
    )


def test_two_rows_that_want_one_expert_get_two() -> None:
    # Both want expert 2. 0.8 and 0.7 are more than 0.1 and 0.9.
    router = np.array([[[0.1, 0.0, 0.8, 0.0], [0.0, 0.7, 0.9, 0.0]]])
    individual = _individual(router)
    found = project(individual)
    assert chosen(found.router).tolist() == [[1, 2]]
    assert np.array_equal(found.experts[0], individual.experts[0][[1, 0]])


@pytest.mark.parametrize("pools", [1, 2, 3])
def test_it_is_the_best_of_all_choices(pools: int) -> None:
    generator = np.random.default_rng(pools)
    individual = _individual(generator.normal(size=(12, 3 if pools != 2 else 4, 6)))
    found = project(individual, pools)
    assert is_one_hot(found.router)
    assert (np.diff(chosen(found.router), axis=1) > 0).all()
    for group, rows in enumerate(individual.router):
        # Undo the order by the experts' coefficients, which no two rows share.
        order = [
            int(np.flatnonzero((individual.experts[group] == row).all(axis=1))[0])
            for row in found.experts[group]
        ]
        total = sum(rows[order[place], expert] for place, expert in enumerate(chosen(found.router)[group]))
        assert total == pytest.approx(_best(rows, pools), abs=1e-6)


def test_a_choice_stays_what_it_is() -> None:
    space = Space(groups=3, kept=4, experts=8, pools=2)
    individual = random_choice(space, np.random.default_rng(0))
    assert project(individual, 2).sha256 == individual.sha256
    assert project(individual, 2).is_choice
    merged = Individual(individual.router[:, ::-1], individual.experts[:, ::-1] * 0.5)
    again = project(merged)
    assert np.array_equal(again.router, individual.router)
    assert np.array_equal(again.experts, individual.experts * np.float32(0.5))


def test_all_experts_may_stay() -> None:
    everything = individual_of(np.arange(5)[None], 5)
    noise = np.random.default_rng(1).normal(scale=0.1, size=everything.router.shape)
    assert np.array_equal(project(_individual(everything.router + noise)).router, everything.router)


def test_negative_rows_still_get_an_expert() -> None:
    found = project(_individual(np.array([[[-3.0, -1.0, -2.0], [-1.0, -0.5, -9.0]]])))
    # -1 and -1 for experts 1 and 0 are more than -2 and -0.5 for experts 2 and 1.
    assert chosen(found.router).tolist() == [[0, 1]]


def test_pools_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 of 6 experts in 2 pools"):
        project(_individual(np.zeros((1, 3, 6))), 2)
