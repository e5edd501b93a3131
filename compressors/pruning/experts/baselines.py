"""Rules that choose experts without a search: what EEP starts from, and what it is compared with.

Each gives the experts that stay of every group of layers. Where a group is larger than a layer, what was
measured is added up over its layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....models.base import OpenModel
from ....models.expert_choice import check_counts, mixture_shape
from ....models.mixtures import Mixture, mixtures
from ....progress import Progress
from ....runtime.moe_config import MoeShape
from .genome import Individual, Space, random_choice
from .layer_groups import LayerGroup, assign, layer_groups
from .reconstruction import SubsetErrors, Subsets, calibration_items, compared, subsets, work_bytes
from .statistics import Routed, RoutingSums, observe

Chosen = tuple[tuple[int, ...], ...]
"""Of every group of layers the experts that stay, ascending."""


@dataclass(frozen=True)
class Rules:
    """What each rule keeps: name of the rule -> its choice.

    Attributes:
        shared: one choice for all layers of a group, as individuals of the search have it.
        by_layer: one for every layer, as the rules were published.
    """

    shared: Mapping[str, Chosen]
    by_layer: Mapping[str, Chosen]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"shared": dict(self.shared), "by_layer": dict(self.by_layer)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Rules:
        """Return what `to_json` gave."""
        read = {
            part: {name: tuple(map(tuple, choice)) for name, choice in values[part].items()}
            for part in ("shared", "by_layer")
        }
        return cls(**read)


def measure(
    model: OpenModel,
    calls: Iterable[dict[str, Any]],
    groups: Sequence[LayerGroup],
    kept: int,
    *,
    active: int | None,
    seed: int,
    progress: Progress,
    items: int | None = None,
) -> Rules:
    """Run the model once over the items and return what each rule keeps.

    `frequency` keeps the experts that most tokens were sent to, `soft_activation` those with the largest sum
    of routing weights over these tokens, `naee` the subset with which the outputs of 64 items change
    least. Of equal experts the first ones stay.

    Args:
        model: the original; not changed.
        calls: keyword arguments of plain forwards, as `observe` takes them.
        groups: of layers.
        kept: experts of a layer that stay.
        active: experts per token of what is left; None: as many as before.
        seed: of the subsets that are compared, where there are too many to compare all, and of the 64 items.
        progress: told after every batch.
        items: how many there are in all calls, for the 64 to be drawn; None: they are the first.

    Returns:
        the choices, for groups of layers and layer by layer.

    Raises:
        PlanError: the counts or groups do not fit the model.
        StageError: as `observe`.
    """
    shape = mixture_shape(model.config)
    check_counts(model.config, kept, active)
    found = mixtures(model.module)
    places = assign(groups, [mixture.name for mixture in found])
    space = Space(len(groups), kept, shape.routing.experts, shape.routing.groups)
    wanted = calibration_items(items, seed)
    sums = RoutingSums(space.experts, [mixture.layer for mixture in found])
    choices = [subsets(space, seed, group) for group in range(space.groups)]
    of_layer = {mixture.layer: choices[places[mixture.name]] for mixture in found}
    errors = {mixture.layer: SubsetErrors(mixture, of_layer[mixture.layer], active) for mixture in found}

    def compare(mixture: Mixture, routed: Routed) -> None:
        errors[mixture.layer].update(mixture, routed.of(wanted))

    observe(model.module, calls, [sums.update, compare], label="measuring experts", progress=progress)
    totals = {layer: error.total for layer, error in errors.items()}

    def rules(groups: Sequence[LayerGroup]) -> dict[str, Chosen]:
        return {
            "frequency": highest(_per_group(sums.counts, groups), space),
            "soft_activation": highest(_per_group(sums.weights, groups), space),
            "naee": closest(_per_group(totals, groups), [of_layer[group.layers[0]] for group in groups]),
        }

    return Rules(rules(groups), rules(layer_groups(shape.sparse, "per_layer")))


def random_choices(space: Space, draws: int, seed: int) -> list[Individual]:
    """Draw choices of experts, uniformly among all.

    Args:
        space: of the individuals.
        draws: how many.
        seed: of the draws; fewer draws of the same seed are the first of more.
    """
    generator = np.random.default_rng(seed)
    return [random_choice(space, generator) for _ in range(draws)]


def highest(scores: Sequence[Tensor], space: Space) -> Chosen:
    """Return the experts with the highest scores, equally many of every pool; of equal ones the first.

    Args:
        scores: [experts] of every group of layers.
        space: of the choice.
    """
    size, count = space.experts // space.pools, space.kept // space.pools
    found = []
    for values in scores:
        best = values.view(space.pools, size).sort(dim=1, descending=True, stable=True).indices[:, :count]
        first = torch.arange(0, space.experts, size)[:, None]
        found.append(tuple(sorted((best + first).flatten().tolist())))
    return tuple(found)


def closest(errors: Sequence[Tensor], choices: Sequence[Subsets]) -> Chosen:
    """Return the subset with the smallest error of every group of layers; of equal ones the first.

    Args:
        errors: [subsets] of every group of layers.
        choices: [subsets, kept] of every group.
    """
    best = [int(values.numpy().argmin()) for values in errors]
    return tuple(tuple(rows[place].tolist()) for rows, place in zip(choices, best, strict=True))


def measuring_bytes(shape: MoeShape, groups: int, kept: int) -> int:
    """Return how many bytes `measure` needs at most beside the model and a forward of one batch.

    Of the batch it holds a copy of what goes into one layer. Nothing depends on how many items there are.

    Args:
        shape: of the model.
        groups: of layers.
        kept: experts of a layer that stay.
    """
    space = Space(groups, kept, shape.routing.experts, shape.routing.groups)
    number, layers = compared(space), len(shape.sparse)
    sums = layers * 2 * space.experts * 8
    errors = number * 8 * (layers + groups * kept)
    return sums + errors + work_bytes(space, shape.width, shape.expert_inner)


def _per_group(values: Mapping[int, Tensor], groups: Sequence[LayerGroup]) -> list[Tensor]:
    return [torch.stack([values[layer] for layer in group.layers]).sum(dim=0) for group in groups]
