"""What of the best individual goes into the model, by the way in which it is to be exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ....models.base import OpenModel
from ....models.experts import keep_experts_of
from ....models.mapped_experts import map_routers_of
from .candidate import kept_of, mixing_of
from .field import Field
from .genome import Coefficients, Individual, is_one_hot
from .projection import project

_MOST_TOLD = 4096
"""Coefficients that a report may hold."""


def shipped(
    best: Individual, export: Literal["stock", "stock-projected", "custom"], pools: int
) -> Individual:
    """Return the individual that is exported: the best one, or what is closest to it with a one-hot router.

    Args:
        best: of the search.
        export: as the settings say.
        pools: of the space.
    """
    if is_one_hot(best.router) or export == "custom":
        return best
    return project(best, pools)


def change(model: OpenModel, individual: Individual, field: Field) -> dict[int, tuple[int, ...]]:
    """Leave of an open model what an individual says.

    A one-hot router makes a stock model, also where a free one was allowed: what was scored is that model.

    Args:
        model: as it was searched.
        individual: of `shipped`.
        field: what was searched over.

    Returns:
        layer -> experts whose rows of the router stay, or that weigh most in a mapped one.
    """
    if is_one_hot(individual.router):
        kept = kept_of(individual, field.groups)
        mixing = None if individual.is_choice else mixing_of(individual, field.groups)
        keep_experts_of(model, kept, active=field.active, mixing=mixing)
        return {layer: tuple(sorted(experts)) for layer, experts in kept.items()}
    mapping, mixing = (_by_layer(matrix, field) for matrix in (individual.router, individual.experts))
    map_routers_of(model, mapping, mixing, active=field.active)
    return kept_of(project(individual, field.space.pools), field.groups)


def _by_layer(matrix: Coefficients, field: Field) -> dict[int, Tensor]:
    return {
        layer: torch.from_numpy(matrix[place].copy())
        for place, group in enumerate(field.groups)
        for layer in group.layers
    }


def told_coefficients(individual: Individual, field: Field) -> Mapping[str, Any]:
    """Return the report's entries on coefficients: `mixing` and, of a free router, `mapping`, by layer.

    Those of large models stand in the file beside the weights alone.
    """
    if individual.is_choice or individual.experts.size > _MOST_TOLD:
        return {}
    matrices = {"mixing": individual.experts}
    if not is_one_hot(individual.router):
        matrices["mapping"] = individual.router
    return {
        name: {
            str(layer): [[round(value, 4) for value in row] for row in rows.tolist()]
            for layer, rows in _by_layer(matrix, field).items()
        }
        for name, matrix in matrices.items()
    }
