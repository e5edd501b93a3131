"""Finding the stock config, if there is one, from which a pruned classifier is built as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError
from ..runtime.manifest import ModuleSurgery
from .base import flat_shapes
from .shapes import complete_config, expected_shapes

Attributes = Mapping[str, Mapping[str, int | float]]
"""Module name -> attribute -> number."""


@dataclass(frozen=True)
class PrunedSizes:
    """What a pruned model really has.

    Attributes:
        shapes: of all tensors.
        attributes: of all attentions.
    """

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Attributes

    @classmethod
    def of(
        cls, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery], implied: Attributes
    ) -> PrunedSizes:
        """Put what was cut over what a config implies.

        Args:
            config: that the model was opened with.
            surgery: what differs from it.
            implied: the attributes that follow from `config`.
        """
        shapes = {**expected_shapes(config["_class_name"], config), **flat_shapes(surgery)}
        names = [*implied, *(name for name in surgery if name not in implied)]
        attributes = {
            name: {**implied.get(name, {}), **(surgery[name].attributes if name in surgery else {})}
            for name in names
        }
        return cls(shapes, {name: values for name, values in attributes.items() if values})

    def are_said_by(self, config: Mapping[str, Any], implied: Attributes) -> bool:
        """Tell whether another config says all of it.

        Args:
            config: completed; one that no stock class takes says nothing.
            implied: the attributes that follow from `config`.
        """
        name = config["_class_name"]
        try:
            complete_config(name, config, "the config of the pruned model")
        except SourceError:
            return False  # such as heads that do not divide the width any more
        return expected_shapes(name, config) == dict(self.shapes) and implied == self.attributes


def attention_attributes(heads: int, head_dim: int) -> dict[str, int | float]:
    """Return what a stock attention of transformers computes with."""
    return {"num_attention_heads": heads, "head_dim": head_dim, "scaling": head_dim**-0.5}
