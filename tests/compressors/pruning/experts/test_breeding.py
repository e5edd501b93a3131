"""Children as the search breeds them: the rates of the settings reach the operators."""

from __future__ import annotations

import numpy as np
import pytest
from compress.compressors.pruning.experts.archive import Record
from compress.compressors.pruning.experts.evolution import Search, breed, starts
from compress.compressors.pruning.experts.genome import Space
from compress.recipes.experts import EepSettings

SPACE = Space(groups=4, kept=4, experts=8)
CHOOSING, MERGING = 50, 150
"""Places in the search, of either phase."""
CHILDREN = 2000


def bred(place, **changes):
    """Yield many children with their parents, of individuals that are all equally fit."""
    settings = EepSettings.model_validate({"keep_experts": 4, **changes})
    first = starts(Search(SPACE, settings, 0))
    known = [Record(index, one.individual, 50.0, one.origin) for index, one in enumerate(first)]
    for seed in range(CHILDREN):
        child = breed(Search(SPACE, settings, seed), place, known, set())
        yield child.individual, [known[index].individual for index in child.origin["parents"]]


def changed_groups(place, name="experts", **changes):
    """Return the share of groups in which a child differs from its only parent."""
    shares = [
        np.mean((getattr(child, name) != getattr(parent, name)).any(axis=(1, 2)))
        for child, (parent,) in bred(place, **changes)
    ]
    return float(np.mean(shares))


@pytest.mark.parametrize(("flag", "share"), [(0.25, 0.25 / (1 - 0.75**4)), (1.0, 1.0)])
@pytest.mark.parametrize("place", [CHOOSING, MERGING])
def test_as_many_groups_change_as_are_flagged(place, flag, share):
    # In a flagged group all rows, or all entries, change; the share is that given that one is flagged.
    certain = {"mut_row": 1.0, "mut_entry": 1.0, "crossover": 0.0, "norm_prob": 0.0}
    found = changed_groups(place, group_flag=flag, **certain)
    assert abs(found - share) <= 3 * (share * (1 - share) / (4 * CHILDREN)) ** 0.5


def test_matrices_of_a_free_router_are_flagged_apart():
    certain = {"mut_entry": 1.0, "crossover": 0.0, "norm_prob": 0.0, "router": "free", "export": "custom"}
    share = 0.25 / (1 - 0.75**8)
    for name in ("experts", "router"):
        found = changed_groups(MERGING, name, **certain)
        assert abs(found - share) <= 3 * (share * (1 - share) / (4 * CHILDREN)) ** 0.5


def test_rows_are_exchanged_at_the_rate_that_is_set():
    new = [
        float((child.experts * (1 - parent.experts.max(axis=1, keepdims=True))).sum()) / 16
        for child, (parent,) in bred(CHOOSING, group_flag=1.0)
    ]
    # Of two rows that are hit, the second takes again what the first has left in 1 of 4 cases: 0.142.
    assert abs(np.mean(new) - 0.142) <= 3 * np.std(new) / CHILDREN**0.5


@pytest.mark.parametrize(("front", "flag"), [(0.6, 1.0), (0.6, 1e-3), (1.0, 0.25), (0.0, 0.25)])
def test_rows_are_the_first_parents_at_the_rate_that_is_set(front, flag):
    quiet = {"mut_sigma": 1e-6, "norm_prob": 0.0, "crossover": 1.0, "group_flag": flag}
    of_first = rows = 0
    for child, (first, second) in bred(MERGING, front_prob=front, **quiet):
        near = [np.abs(child.experts - one.experts).max(axis=2) < 1e-4 for one in (first, second)]
        assert (near[0] | near[1]).all()
        differ = near[0] != near[1]
        of_first, rows = of_first + int((near[0] & differ).sum()), rows + int(differ.sum())
    # Rows of a group that is not flagged are of one parent together, so they count as one.
    assert abs(of_first / rows - front) <= 3 * (front * (1 - front) / (3 * CHILDREN)) ** 0.5
