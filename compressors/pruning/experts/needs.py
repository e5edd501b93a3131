"""What a search of experts needs, and what it will do, told before it starts."""

from __future__ import annotations

from ....models.base import ModelSpec
from ....models.expert_choice import mixture_shape
from ....models.llm import REFERENCE_TOKENS
from ....models.moe_shapes import expert_parameters
from ....recipes.experts import EepSettings
from .baselines import measuring_bytes
from .field import Field

_FLOAT32 = 4
_LOGITS = 2  # of a batch, and their probabilities
_STREAMS = 8  # tensors as wide as the model that a layer holds at a time


def search_bytes(spec: ModelSpec, settings: EepSettings, field: Field) -> int:
    """Return the bytes that a search needs beside the model.

    Merged experts lie beside the original ones; before that, the rules are measured. A batch is taken to be
    as long as the reference input; items are mostly shorter.
    """
    shape = mixture_shape(spec.config)
    merged = field.space.kept * len(shape.sparse) * expert_parameters(shape) * spec.dtype.itemsize
    tokens = settings.fitness.batch_size * min(REFERENCE_TOKENS, shape.positions)
    width = _LOGITS * shape.vocabulary + _STREAMS * max(shape.width, shape.expert_inner)
    chooses = field.space.kept < field.space.experts
    measuring = measuring_bytes(shape, field.space.groups, field.space.kept) if chooses else 0
    return max(merged if settings.merges else 0, measuring) + tokens * width * _FLOAT32


def search_notes(spec: ModelSpec, settings: EepSettings, field: Field) -> list[str]:
    """Say what the search does, and where its data decide."""
    space = field.space
    total = settings.total_evals
    notes = []
    if space.kept < space.experts:
        first = min(settings.prune_evals, space.choices)
        notes.append(
            f"search: {first} evaluations choose {space.kept} of {space.experts} experts in"
            f" {space.groups} groups of layers; which ones depends on the items"
        )
        total -= first
    if settings.merges:
        notes.append(f"search: {total} evaluations merge experts; the router's rows {_router(settings)}")
    draws = settings.random_draws if space.kept < space.experts else 0
    notes.append(
        "compared on the test items with the original"
        + (f", three simpler rules and {draws} random choices" if space.kept < space.experts else "")
    )
    return notes


def _router(settings: EepSettings) -> str:
    return "stay as they are" if settings.router == "onehot" else "are mixed as well"
