"""Labels that a class-conditional denoiser forgets while it is trained: drawn by us, not by the module.

The stock module of DiT drops labels on its own in training mode, with numbers from the global generator, and
once in every block. A teacher beside it could not see the same labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def label_embedders(module: nn.Module) -> list[Any]:
    """Return the modules that embed class labels and may drop them, in the order of the model."""
    from diffusers.models.embeddings import LabelEmbedding

    return [child for child in module.modules() if isinstance(child, LabelEmbedding)]


def drop_rate(module: nn.Module) -> tuple[float, int]:
    """Return (share of the labels that the stock module drops, label that means none), or (0, 0)."""
    for embedder in label_embedders(module):
        if len(embedder.embedding_table.weight) > embedder.num_classes:
            return float(embedder.dropout_prob), int(embedder.num_classes)
    return 0.0, 0


@contextmanager
def labels_as_given(module: nn.Module) -> Iterator[None]:
    """Let the stock module drop no label within the context, in whatever mode it is."""
    embedders = label_embedders(module)
    rates = [embedder.dropout_prob for embedder in embedders]
    try:
        for embedder in embedders:
            embedder.dropout_prob = 0.0
        yield
    finally:
        for embedder, rate in zip(embedders, rates, strict=True):
            embedder.dropout_prob = rate
