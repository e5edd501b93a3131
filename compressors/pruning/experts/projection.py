"""A free router rounded to one row of the original's for every new expert, so that stock code has it.

The closest choice to a mapping, by the sum of squared differences, is the one whose entries add up to most,
because all choices have as many ones. Which row takes which expert is an assignment, solved exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from .genome import Choice, Coefficients, Individual, one_hot


def project(individual: Individual, pools: int = 1) -> Individual:
    """Return the individual with one-hot rows, all different, in the place of the mapping of the router.

    Rows come in the order of their experts, and those of the experts' coefficients with them; these keep
    their values. An individual whose router is one-hot already is only put into that order.

    Args:
        individual: of any coefficients.
        pools: parts of equal size that a layer's experts fall into; of each, equally many rows are left.

    Raises:
        ValueError: the pools do not divide the experts, or not what is kept.
    """
    groups, kept, experts = individual.router.shape
    if experts % pools or kept % pools:
        raise ValueError(f"{kept} of {experts} experts in {pools} pools")
    choice: Choice = np.stack([_assigned(rows, pools) for rows in individual.router])
    order = np.argsort(choice, axis=1)
    return Individual(
        one_hot(np.take_along_axis(choice, order, axis=1), experts),
        np.take_along_axis(individual.experts, order[..., None], axis=1),
    )


def _assigned(rows: Coefficients, pools: int) -> NDArray[np.int64]:
    """Return the expert of every row of one group, [kept].

    Args:
        rows: [kept, experts].
        pools: of the router.
    """
    kept, experts = rows.shape
    size = experts // pools
    cost = np.full((experts, experts), np.inf)
    cost[:kept] = -rows.astype(np.float64)
    # Rows that are not there take, of every pool, the experts that no row may have.
    for place in range(experts - kept):
        pool = place // (size - kept // pools)
        cost[kept + place, pool * size : (pool + 1) * size] = 0.0
    return linear_sum_assignment(cost)[1][:kept].astype(np.int64)
