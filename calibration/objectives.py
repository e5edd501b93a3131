"""Whose gradient says what a weight is worth: losses over calibration samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from ..models.base import OpenModel


class Objective(Protocol):
    """A loss over samples, in parts that fit into memory."""

    @property
    def key(self) -> str:
        """Content hash of the samples and of the loss."""

    @property
    def samples(self) -> int:
        """How many samples the whole loss is over."""

    @property
    def parts(self) -> int:
        """How many parts `losses` yields."""

    def losses(self, model: OpenModel, start: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (loss, samples) part by part, from part `start` on.

        A loss is the SUM over its samples, with its graph, of the model as it is when the part is
        computed. Sums make the result independent of how samples are split into parts.
        """
