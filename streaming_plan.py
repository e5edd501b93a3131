"""What a run from disk to disk needs, told before it starts; see `streaming`."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from .compressors.base import StagePlan
from .models.base import ModelSpec
from .recipes.schema import Recipe
from .recipes.streamed import given_experts, needs_memory
from .runtime.moe_names import parts_of

_FLOAT32 = 4
_COMPARED_BYTES = 96 * 2**20  # of the process that compares, and its chunks


def planned(plan: StagePlan, before: ModelSpec, recipe: Recipe) -> StagePlan:
    """Return the plan of a stage as this way of running carries it out, or say why it is not taken.

    Args:
        plan: of the stage, in memory.
        before: of the model before it.
        recipe: of which it is the only stage, where it keeps named experts; of others the plan stays.
    """
    if given_experts(recipe) is None:
        return plan
    needed = peak_bytes(before, plan.spec, convert=recipe.model.dtype is not None)
    why = needs_memory(recipe)
    if why is None:
        note = "goes from disk to disk: no memory holds the model, and no outputs are computed or compared"
        return replace(plan, peak_memory_bytes=needed, notes=[*plan.notes, note])
    note = (
        f"opens the model in memory, because of {why}; with `evaluate: {{fidelity: null}}`, in the format"
        f" compress, such a recipe goes from disk to disk, with {needed:,} bytes beside the process"
    )
    return replace(plan, notes=[*plan.notes, note])


def peak_bytes(before: ModelSpec, after: ModelSpec, *, convert: bool) -> int:
    """Return the bytes beside the process that cutting on disk takes at its worst moment.

    Args:
        before: of the source.
        after: of what is written.
        convert: the weights are written in another type than they may be stored in.
    """
    name = str(after.config["_class_name"])
    largest = max(_held_bytes(name, key, before, after, convert=convert) for key in after.tensors)
    return largest + _COMPARED_BYTES


def _held_bytes(class_name: str, name: str, before: ModelSpec, after: ModelSpec, *, convert: bool) -> int:
    """Return the bytes in memory while a tensor, or the largest of the parts it is stored in, is made."""
    old, new = before.tensors[name], after.tensors[name]
    parts = parts_of(class_name, name, new.shape)
    items = max((prod(part.shape(new.shape)) for part in parts.values()), default=prod(new.shape))
    # What holds all experts is put together from those that stay, one after the other.
    one = old.bytes // old.shape[0] if not parts and old.shape != new.shape else 0
    return items * (new.dtype.itemsize + (_FLOAT32 if convert else 0)) + one
