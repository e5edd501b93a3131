"""How a child is made of its parents: flags, exchange of experts, noise, rows of two parents, row sums.

Everything random comes from the generator that is passed. Rates are those of `EepSettings`.

Two things are settled that the paper leaves open. A replaced expert is another one afterwards, so that the
rate of changed rows is the rate that was set. And where the router stays one-hot, a child of two parents
takes the router's rows of a group as a whole: of the first parent where the group's merging coefficients are
mixed by rows, else of the parent that these come from. Mixed rows of a one-hot router would name an expert
twice, and experts that were merged for other rows of the router would be of no use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ....recipes.experts import EepSettings
from .genome import Coefficients, Individual, Space, chosen, individual_of

Flags = NDArray[np.bool_]
"""[groups, 1] while experts are chosen and where the router stays one-hot, else [groups, 2]: of the merging
coefficients and of the router's."""

_NO_SUM = 1e-6  # a row with a smaller sum cannot be divided by it


def draw_flags(count: int, matrices: int, chance: float, generator: np.random.Generator) -> Flags:
    """Draw which matrices may change, again until there is one.

    Args:
        count: of groups.
        matrices: of a group that can change, 1 or 2.
        chance: of each.
        generator: of the child.
    """
    while True:
        flags = generator.random((count, matrices)) < chance
        if flags.any():
            return flags


def swap_experts(
    parent: Individual, space: Space, flags: Flags, chance: float, generator: np.random.Generator
) -> Individual:
    """Replace kept experts of flagged groups by experts that the group has not kept.

    Args:
        parent: an individual that only chooses.
        space: of all individuals.
        flags: [groups, 1].
        chance: of a row.
        generator: of the child.

    Returns:
        Another choice; perhaps the parent's, where no row was hit.
    """
    choice = chosen(parent.experts)
    for group in np.flatnonzero(flags[:, 0]):
        for row in np.flatnonzero(generator.random(space.kept) < chance):
            used = set(choice[group].tolist())
            unused = [expert for expert in space.pool(int(choice[group, row])) if expert not in used]
            if unused:
                choice[group, row] = unused[int(generator.integers(len(unused)))]
    return individual_of(choice, space.experts)


def add_noise(
    parent: Individual, flags: Flags, settings: EepSettings, generator: np.random.Generator
) -> Individual:
    """Add Gaussian noise to single entries of flagged matrices.

    Args:
        parent: any individual.
        flags: [groups, 2], or [groups, 1] where the router stays as it is.
        settings: `mut_entry`, `mut_sigma`.
        generator: of the child.
    """
    found = [parent.experts.copy(), parent.router.copy()]
    for group, matrix in np.argwhere(flags):
        values = found[matrix][group]
        hit = generator.random(values.shape) < settings.mut_entry
        noise = settings.mut_sigma * generator.standard_normal(values.shape)
        values[hit] += noise[hit].astype(np.float32)
    router = found[1] if flags.shape[1] > 1 else parent.router
    return Individual(router, found[0])


def cross_rows(
    parents: Sequence[Individual], flags: Flags, chance: float, generator: np.random.Generator
) -> Individual:
    """Mix two parents: rows of flagged matrices, the other matrices as a whole.

    Args:
        parents: the first, and the second.
        flags: [groups, 2], or [groups, 1] where the router stays one-hot.
        chance: of a row, or of a whole matrix, to be the first parent's.
        generator: of the child.
    """
    first, second = parents
    experts, taken = _mixed(first.experts, second.experts, flags[:, 0], chance, generator)
    if flags.shape[1] == 1:
        router = np.where(taken[:, None, None], first.router, second.router)
    else:
        router, _ = _mixed(first.router, second.router, flags[:, 1], chance, generator)
    return Individual(router, experts)


def _mixed(
    first: Coefficients,
    second: Coefficients,
    flags: NDArray[np.bool_],
    chance: float,
    generator: np.random.Generator,
) -> tuple[Coefficients, NDArray[np.bool_]]:
    """Return the mixture, and [groups] whether a group is the first's or begins with it."""
    rows = generator.random(first.shape[:2]) < chance
    whole = generator.random(first.shape[:1]) < chance
    of_first: NDArray[np.bool_] = np.where(flags[:, None], rows, whole[:, None])
    return np.where(of_first[..., None], first, second), flags | whole


def divide_by_sums(parent: Individual) -> Individual:
    """Divide every row of the merging coefficients by its sum; never the router's.

    A row that sums to nothing stays as it is.
    """
    sums = parent.experts.sum(axis=2, keepdims=True)
    divided = parent.experts / np.where(np.abs(sums) < _NO_SUM, np.float32(1.0), sums)
    return Individual(parent.router, divided.astype(np.float32))
