"""What the bits on offer are called, in tables and programs."""

from __future__ import annotations

from ....recipes.allocation import FLOAT_BITS


def nominal_bits(label: str) -> int:
    """Return the bits that a label such as "w4" or "a8" stands for."""
    return int(label[1:])


def label_of_weight(bits: int) -> str:
    """Return the label of a weight's bits."""
    return f"w{bits}"


def label_of_activation(bits: int) -> str:
    """Return the label of an activation's bits."""
    return f"a{bits}"


FLOAT_LABEL = label_of_weight(FLOAT_BITS)
"""Label of the choice that leaves a layer in floating point."""
