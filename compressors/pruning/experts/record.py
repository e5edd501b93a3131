"""A file beside the weights that says which experts stayed, and what they were made of.

Rounds of one run follow each other in it; each counts experts as the model had them before that round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .genome import Individual
from .layer_groups import LayerGroup

NAME = "experts.json"
_FORMAT = 1


def recorded(
    before: str | None,
    kept: Mapping[int, Sequence[int]],
    about: Mapping[str, Any],
    found: Individual | None = None,
    groups: Sequence[LayerGroup] = (),
) -> str:
    """Return the file.

    Args:
        before: what it was before this round; None: nothing.
        kept: layer -> experts that stay.
        about: of the round: how many there were, what decided it. JSON values.
        found: the coefficients; None, or a choice: experts stay as they are.
        groups: of layers, of `found`.
    """
    rounds = [] if before is None else list(json.loads(before)["rounds"])
    round_: dict[str, Any] = {
        **about,
        "experts": {str(layer): list(experts) for layer, experts in kept.items()},
    }
    if found is not None and not found.is_choice:
        round_["coefficients"] = [
            {
                "layers": list(group.layers),
                "experts": _rows(found.experts[place]),
                **({} if _one_hot(found.router[place]) else {"router": _rows(found.router[place])}),
            }
            for place, group in enumerate(groups)
        ]
    return json.dumps({"version": _FORMAT, "rounds": [*rounds, round_]}, indent=1) + "\n"


def _rows(values: Any) -> list[list[float]]:
    """Return exact decimals of float32 values, as short as they can be."""
    return [[float(str(value)) for value in row] for row in values]


def _one_hot(values: Any) -> bool:
    return bool(((values == 0.0) | (values == 1.0)).all())
