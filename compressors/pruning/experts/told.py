"""What the report, and a file beside the weights, say of the experts that a model has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....models.base import OpenModel
from ....models.expert_choice import mixture_shape
from ....runtime.moe_config import Routing
from .genome import Individual
from .layer_groups import LayerGroup
from .record import NAME, recorded


def told(model: OpenModel, before: Routing, kept: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Return JSON values.

    Args:
        model: as it is now.
        before: how the router chose before.
        kept: layer -> experts that stay, by their numbers before.
    """
    after = mixture_shape(model.config).routing
    return {
        "experts_before": before.experts,
        "experts_after": after.experts,
        "active_before": before.active,
        "active_after": after.active,
        "experts": {str(layer): list(experts) for layer, experts in kept.items()},
    }


def write_down(
    model: OpenModel,
    before: Routing,
    kept: Mapping[int, Sequence[int]],
    *,
    about: Mapping[str, Any],
    found: Individual | None = None,
    groups: Sequence[LayerGroup] = (),
) -> None:
    """Put `experts.json` beside the weights; see `record.recorded`."""
    counts = {"of": before.experts, "active_before": before.active}
    text = recorded(model.attachments.get(NAME), kept, {**about, **counts}, found, groups)
    model.attachments[NAME] = text
