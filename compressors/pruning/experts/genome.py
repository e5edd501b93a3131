"""What evolves: per group of layers a matrix that mixes routing weights, and one that mixes experts.

Both are [groups, kept, experts]. Row j of the first says which of the router's weights after its softmax
make up the weight of the new expert j, row j of the second which experts its tensors are made of. Where
experts are only chosen, both are equal, with a single 1 in every row.

An individual that only chooses has its rows in the order of the experts. The order changes nothing in the
model, and so two orders of one choice are one individual, which is evaluated once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ....errors import PlanError

Coefficients = NDArray[np.float32]
"""[groups, kept, experts]."""
Choice = NDArray[np.int64]
"""[groups, kept]: the expert of every row."""


@dataclass(frozen=True)
class Space:
    """What individuals look like.

    Attributes:
        groups: of layers.
        kept: experts of a layer that stay.
        experts: of a layer now.
        pools: parts of equal size that a layer's experts fall into, in order; every pool keeps equally many.
            More than 1 for routers that choose among groups of experts first.
    """

    groups: int
    kept: int
    experts: int
    pools: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            PlanError: naming the counts.
        """
        if self.groups < 1 or self.pools < 1 or not 1 <= self.kept <= self.experts:
            raise PlanError(f"{self.kept} of {self.experts} experts in {self.groups} groups of layers")
        if self.experts % self.pools or self.kept % self.pools:
            raise PlanError(
                f"keep_experts: {self.kept} of {self.experts} experts; the router has {self.pools} groups of "
                "experts, which all have equally many",
                hint=f"keep a multiple of {self.pools}",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of each of the two arrays."""
        return self.groups, self.kept, self.experts

    @property
    def choices(self) -> int:
        """How many ways there are to choose experts."""
        one = math.comb(self.experts // self.pools, self.kept // self.pools)
        return one ** (self.pools * self.groups)

    def pool(self, expert: int) -> range:
        """Return the experts that an expert can be replaced by, itself among them."""
        size = self.experts // self.pools
        first = expert // size * size
        return range(first, first + size)


@dataclass(frozen=True, eq=False)
class Individual:
    """Coefficients of a whole model; never changed.

    Attributes:
        router: [groups, kept, experts] of the routing weights.
        experts: the same, of the experts' tensors.
    """

    router: Coefficients
    experts: Coefficients

    def __post_init__(self) -> None:
        if self.router.ndim != 3 or self.router.shape != self.experts.shape:
            raise ValueError(f"coefficients {self.router.shape} and {self.experts.shape}")
        for name in ("router", "experts"):
            values = np.ascontiguousarray(getattr(self, name), dtype=np.float32)
            if values.flags.writeable:
                values = values.copy()
                values.flags.writeable = False
            object.__setattr__(self, name, values)

    @cached_property
    def sha256(self) -> str:
        """Of the values, 64 hexadecimal digits: equal individuals have equal ones."""
        found = hashlib.sha256(f"{self.router.shape}".encode())
        for values in (self.router, self.experts):
            found.update((values + np.float32(0.0)).tobytes())  # -0 and 0 mix alike
        return found.hexdigest()

    @cached_property
    def is_choice(self) -> bool:
        """Whether experts are only chosen: both arrays are equal, one-hot, and no expert occurs twice."""
        return is_one_hot(self.router) and bool(np.array_equal(self.router, self.experts))


def is_one_hot(values: Coefficients) -> bool:
    """Tell whether every row is a single 1, in another column than those of its group's other rows."""
    binary = bool(np.all((values == 0.0) | (values == 1.0)))
    return binary and bool(np.all(values.sum(axis=2) == 1.0) and np.all(values.sum(axis=1) <= 1.0))


def one_hot(choice: Choice, experts: int) -> Coefficients:
    """Return [groups, kept, experts] with a 1 at the expert of every row.

    Args:
        choice: [groups, kept].
        experts: of a layer.
    """
    found: Coefficients = np.zeros((*choice.shape, experts), dtype=np.float32)
    np.put_along_axis(found, choice[..., None], np.float32(1.0), axis=2)
    return found


def chosen(values: Coefficients) -> Choice:
    """Return [groups, kept]: the expert with the largest coefficient of every row."""
    return values.argmax(axis=2).astype(np.int64)


def individual_of(choice: Choice, experts: int) -> Individual:
    """Return the individual that keeps experts as they are, in their order.

    Args:
        choice: [groups, kept], distinct in a group.
        experts: of a layer.
    """
    both = one_hot(np.sort(choice, axis=1), experts)
    both.flags.writeable = False
    return Individual(both, both)


def identity(space: Space) -> Individual:
    """Return the individual that changes nothing: where merging starts if all experts stay."""
    return individual_of(np.tile(np.arange(space.experts), (space.groups, 1)), space.experts)


def random_choice(space: Space, generator: np.random.Generator) -> Individual:
    """Draw experts of every group, uniformly among all choices."""
    size, count = space.experts // space.pools, space.kept // space.pools
    choice = np.empty((space.groups, space.pools, count), dtype=np.int64)
    for group in range(space.groups):
        for pool in range(space.pools):
            choice[group, pool] = pool * size + generator.permutation(size)[:count]
    return individual_of(choice.reshape(space.groups, space.kept), space.experts)


def given_choice(space: Space, kept: Sequence[Sequence[int]], name: str) -> Individual:
    """Return the individual of a choice that was made elsewhere.

    Args:
        space: what it has to look like.
        kept: experts of every group of layers, in any order.
        name: where the choice comes from, for the message.

    Raises:
        PlanError: it does not fit the space.
    """
    size = space.experts // space.pools
    for group, experts in enumerate(kept):
        fits = len(set(experts)) == len(experts) == space.kept
        counts = [sum(expert // size == pool for expert in experts) for pool in range(space.pools)]
        if not fits or set(counts) != {space.kept // space.pools}:
            raise PlanError(
                f"{name}: experts {sorted(experts)} of group {group} are not {space.kept} of {space.experts}"
                + (f", equally many of each of the {space.pools} groups of the router" * (space.pools > 1))
            )
    if len(kept) != space.groups:
        raise PlanError(f"{name}: experts of {len(kept)} groups of layers, not of {space.groups}")
    return individual_of(np.array(kept, dtype=np.int64), space.experts)


def to_arrays(individual: Individual) -> dict[str, NDArray[np.generic]]:
    """Return what is stored of an individual: `router` and `experts`, or `choice` in place of equal ones.

    A one-hot router beside merged experts is stored as its choice; with many experts that halves the file.
    """
    if individual.is_choice:
        return {"choice": chosen(individual.router)}
    router: NDArray[np.generic] = individual.router
    if is_one_hot(individual.router):
        router = chosen(individual.router)
    return {"router": router, "experts": individual.experts}


def from_arrays(arrays: Mapping[str, NDArray[np.generic]], space: Space) -> Individual:
    """Return the individual that `to_arrays` stored.

    Raises:
        ValueError: the arrays are not those of an individual of this space.
    """
    if set(arrays) == {"choice"}:
        both = _dense(arrays["choice"], space)
        both.flags.writeable = False
        return Individual(both, both)
    if set(arrays) != {"router", "experts"}:
        raise ValueError(f"arrays {sorted(arrays)}")
    return Individual(_dense(arrays["router"], space), _dense(arrays["experts"], space))


def _dense(values: NDArray[np.generic], space: Space) -> Coefficients:
    if values.dtype == np.int64 and values.shape == space.shape[:2]:
        choice: Choice = values.astype(np.int64)
        if choice.size and (choice.min() < 0 or choice.max() >= space.experts):
            raise ValueError(f"an expert that is none of {space.experts}")
        return one_hot(choice, space.experts)
    if values.dtype == np.float32 and values.shape == space.shape:
        return values.astype(np.float32)
    raise ValueError(f"{values.dtype} {list(values.shape)} for {list(space.shape)}")
