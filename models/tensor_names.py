"""Names and shapes of the tensors of plain layers, of which a state dict is put together. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

TIMESTEP_CHANNELS = 256


def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Named:
    """Yield the tensors of a linear layer."""
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def affine(name: str, width: int, present: bool = True) -> Named:
    """Yield the scale and the shift of a norm; nothing of one that has none."""
    if present:
        yield f"{name}.weight", (width,)
        yield f"{name}.bias", (width,)
