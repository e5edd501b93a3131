"""Second moments of what attentions read, over the calibration: all that the closed-form factors depend on.

Keys and values of an attention read the same tensor, so one matrix serves both. Of a large model these
matrices do not lie in memory together: attentions are measured in portions, one replay each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...calibration.base import Calibration
from ...errors import StageError
from ...models.base import OpenModel
from ...progress import Progress

ENERGY_BUDGET_BYTES = 2 * 2**30
"""Matrices that lie in memory together; one does, however large it is."""
ROWS_AT_ONCE = 4096
"""Tokens that are converted to float64 at a time."""
FLOAT64_BYTES = 8


@dataclass(frozen=True)
class Energy:
    """What is known of an attention's input x.

    Attributes:
        gram: mean of x^T x over all tokens, [h, h] float64.
        magnitude: mean of |x|, [h] float64.
        tokens: how many there were.
    """

    gram: Tensor
    magnitude: Tensor
    tokens: int


class _Sums:
    """Running sums of one input."""

    def __init__(self) -> None:
        self.gram: Tensor | None = None
        self.magnitude: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Take tokens [..., h] of any floating-point type."""
        for part in x.reshape(-1, x.shape[-1]).split(ROWS_AT_ONCE):
            rows = part.double()
            if self.gram is None or self.magnitude is None:
                self.gram = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.magnitude = rows.new_zeros(rows.shape[1])
            self.gram.addmm_(rows.T, rows)
            self.magnitude += rows.abs().sum(dim=0)
            self.tokens += len(rows)

    def mean(self, name: str) -> Energy:
        """Return the averages.

        Raises:
            StageError: a value is not finite.
        """
        assert self.gram is not None
        assert self.magnitude is not None
        if not torch.isfinite(self.gram).all():
            raise StageError(f"{name}: its calibration inputs are not finite", hint="check the calibration")
        return Energy(self.gram.div_(self.tokens), self.magnitude.div_(self.tokens), self.tokens)


def portions(needed_bytes: Mapping[str, int], budget_bytes: int) -> list[list[str]]:
    """Split names, in their order, so that what a part needs fits a budget; a part has one name at least.

    Args:
        needed_bytes: name -> bytes.
        budget_bytes: for all names of a part.
    """
    found: list[list[str]] = []
    room = 0
    for name, needed in needed_bytes.items():
        if not found or needed > room:
            found.append([])
            room = budget_bytes
        found[-1].append(name)
        room -= needed
    return found


def measure(
    model: OpenModel, sources: Mapping[str, str], calibration: Calibration, progress: Progress
) -> dict[str, Energy]:
    """Replay the calibration once and return what attentions read.

    Args:
        model: as it came in.
        sources: attention -> the linear whose input is looked at.
        calibration: to replay.
        progress: to report to.

    Raises:
        StageError: a linear is never reached, or its inputs are not finite.
    """
    sums = {linear: _Sums() for linear in sources.values()}

    def observe(name: str, x: Tensor, timesteps: Tensor) -> None:
        sums[name].update(x.detach())

    calibration.observe(model, list(sums), observe, progress)
    return {name: sums[linear].mean(name) for name, linear in sources.items()}


@dataclass
class Energies:
    """All of a model's, in portions, as often as they are asked for.

    Attributes:
        model, calibration, progress: as of `measure`.
        sources: attention -> the linear whose input is looked at.
        widths: attention -> channels of its input.
    """

    model: OpenModel
    calibration: Calibration
    progress: Progress
    sources: Mapping[str, str]
    widths: Mapping[str, int]
    _kept: dict[str, Energy] = field(default_factory=dict)

    def each(self) -> Iterator[tuple[str, Energy]]:
        """Yield attention and energy, in the order of the model; what fits in memory is measured once.

        Raises:
            StageError: see `measure`.
        """
        parts = portions(
            {name: FLOAT64_BYTES * width**2 for name, width in self.widths.items()}, ENERGY_BUDGET_BYTES
        )
        for part in parts:
            if not self._kept.keys() >= set(part):
                self._kept.clear()  # what was measured before goes before more is measured
                sources = {name: self.sources[name] for name in part}
                self._kept |= measure(self.model, sources, self.calibration, self.progress)
            for name in part:
                yield name, self._kept[name]
