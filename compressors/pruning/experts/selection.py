"""Who becomes a parent, and who is scored again in the end.

A parent is drawn uniformly among those within some points of the best. The released script draws among one
more, the first below that; here it is left out, as the paper has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from ....recipes.experts import EepSettings


class Scored(Protocol):
    """What can be ranked."""

    @property
    def index(self) -> int:
        """Place in the order of the search."""

    @property
    def fitness(self) -> float:
        """In points; more is better."""


T = TypeVar("T", bound=Scored)


def ranked(records: Sequence[T], generator: np.random.Generator) -> list[T]:
    """Return records with the fittest first; those of equal fitness in an order that is drawn anew."""
    order = generator.permutation(len(records))
    return sorted((records[place] for place in order), key=lambda record: -record.fitness)


def parents(records: Sequence[T], gap: float, least: int = 1) -> list[T]:
    """Return those that may be parents.

    Args:
        records: ranked, at least one.
        gap: points below the best down to which one is among them.
        least: so many of the best are, however far below.
    """
    lowest = records[0].fitness - gap
    within = sum(record.fitness >= lowest for record in records)
    return list(records[: max(within, least)])


def one_parent(records: Sequence[T], settings: EepSettings, generator: np.random.Generator) -> T:
    """Draw the parent of a mutation."""
    among = parents(ranked(records, generator), settings.parent_gap)
    return among[int(generator.integers(len(among)))]


def two_parents(records: Sequence[T], settings: EepSettings, generator: np.random.Generator) -> list[T]:
    """Draw two distinct parents, in an order that counts.

    Args:
        records: at least two.
        settings: `cross_gap`, `cross_rank`.
        generator: of the child.
    """
    among = parents(ranked(records, generator), settings.cross_gap, settings.cross_rank)
    return [among[place] for place in generator.permutation(len(among))[:2]]


def best(records: Sequence[T], count: int = 1) -> list[T]:
    """Return the fittest; of equal ones the earlier, which merges less."""
    return sorted(records, key=lambda record: (-record.fitness, record.index))[:count]
