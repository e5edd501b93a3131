"""An open model, or the sizes of one, without some of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PlanError
from ..runtime.manifest import ModuleSurgery
from .base import ModelSpec, OpenModel
from .blocks import Kept, checked, depths, drop_blocks, renamed, shallower_config
from .origins import NAME, write_origins


def shallower_spec(spec: ModelSpec, kept: Mapping[str, Sequence[int]]) -> ModelSpec:
    """Return the spec of a dense model without the other blocks.

    Args:
        spec: as planned so far.
        kept: list of blocks -> places that stay; lists that are not named stay whole.

    Raises:
        PlanError: such a model cannot be left.
    """
    chosen = checked(spec.config, kept)
    config = shallower_config(spec.config, chosen)
    return spec.cut(_renumbered(spec.surgery, chosen), config, _copies(spec.shared, chosen))


def keep_blocks(
    model: OpenModel, kept: Mapping[str, Sequence[int]], about: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Remove all other blocks of an open model, in place, and note where those that stay come from.

    Args:
        model: dense.
        kept: list of blocks -> places that stay; lists that are not named stay whole.
        about: of the removal, for the file beside the weights: its method, and what decided it. JSON values.
            The file names as well what the blocks were removed from.

    Returns:
        For the report: each list that `kept` names -> `of`, the blocks before, and `kept`, the places of
        those that stay.

    Raises:
        PlanError: such a model cannot be left, or the model is quantized.
        StageError: what stays needs what would go.
    """
    if model.quantization:
        raise PlanError(
            "the model is quantized; blocks are removed from models in floating point",
            hint="put the removal of blocks before the quantizer",
        )
    chosen, before = checked(model.config, kept), depths(model.config)
    drop_blocks(model.module, model.config, chosen)
    model.config = shallower_config(model.config, chosen)
    model.surgery = _renumbered(model.surgery, chosen)
    model.shared = _copies(model.shared, chosen)
    places = {name: list(row) for name, row in chosen.items()}
    parent = {"parent": model.source.id, "revision": model.source.revision}
    told = {**about, **parent, "kept": places, "of": before}
    model.attachments[NAME] = write_origins(model.attachments.get(NAME), chosen, before, told)
    return {name: {"of": before[name], "kept": places[name]} for name in kept}


def _renumbered(surgery: Mapping[str, ModuleSurgery], kept: Kept) -> dict[str, ModuleSurgery]:
    names = {name: renamed(name, kept) for name in surgery}
    return {new: surgery[old] for old, new in names.items() if new is not None}


def _copies(shared: Mapping[str, str], kept: Kept) -> dict[str, str]:
    """Return copy -> stored tensor of what is left; where that went, the first copy takes its place."""
    groups: dict[str, list[str]] = {}
    for copy, first in shared.items():
        groups.setdefault(first, [first]).append(copy)
    found: dict[str, str] = {}
    for names in groups.values():
        left = [new for name in names if (new := renamed(name, kept)) is not None]
        found.update(dict.fromkeys(left[1:], left[0]) if left else {})
    return found
