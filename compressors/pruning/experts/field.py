"""What a search of experts is over: groups of layers, how many experts stay, and of how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....models.expert_choice import check_counts, mixture_shape
from ....recipes.experts import EepSettings
from .genome import Space
from .layer_groups import LayerGroup, layer_groups


@dataclass(frozen=True)
class Field:
    """What is searched over.

    Attributes:
        groups: of layers that share their coefficients.
        space: of individuals.
        active: experts per token from now on; None: as many as before.
    """

    groups: tuple[LayerGroup, ...]
    space: Space
    active: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any], settings: EepSettings) -> Field:
        """Hold the settings against a model.

        Args:
            config: completed, with `_class_name`.
            settings: without given experts.

        Raises:
            PlanError: they do not fit it.
        """
        shape = mixture_shape(config)
        kept = settings.kept(shape.routing.experts)
        groups = layer_groups(shape.sparse, settings.groups)
        space = Space(len(groups), kept, shape.routing.experts, shape.routing.groups)
        check_counts(config, kept, settings.active_experts)
        active = settings.active_experts
        return cls(groups, space, None if active == shape.routing.active else active)
