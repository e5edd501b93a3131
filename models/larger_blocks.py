"""Blocks that hold more than others of their list: what a model weighs without some depends on which ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import depths


def larger_blocks(config: Mapping[str, Any]) -> frozenset[tuple[str, int]]:
    """Return (list, place) of the blocks that hold more than the others of their list.

    The last block of some models holds less, and that does not count: whichever is left as the last one is
    made like it.

    Args:
        config: completed, with `_class_name`.
    """
    dual = config.get("dual_attention_layers") or ()
    return frozenset(
        (name, place) for name, depth in depths(config).items() for place in dual if place < depth
    )
