"""Running statistics of a linear's inputs. Each takes batches as they come and keeps kilobytes.

All share `update(x, timesteps)`: x [batch, tokens, channels] float, timesteps [batch] float32 (one
value per batch item), so any of them can stand behind a calibration observer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

V1_MOMENTUM = 0.95
V1_ZERO = 1e-5
V2_FLOOR = 1e-3


class Statistic(Protocol):
    """Anything that can be fed an observer's batches."""

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch: x [batch, tokens, channels], timesteps [batch]."""


class ChannelAbsMax:
    """Largest magnitude of every input channel: over all calls, and per timestep.

    `maximum` is ViDiT-Q's v2 statistic (arXiv 2406.02540): the maximum over all calibration calls,
    that is steps, samples, both guidance halves and tokens. `range_averages` is v1's: per timestep
    range, the moving average (momentum 0.95, the first call as it is) of the batch mean of the token
    maximum. Kept in float32.

    Args:
        ranges: inclusive (low, high) timestep ranges for v1's statistic; empty: not computed.
        per_timestep: also keep the maximum of every timestep.
        momentum: weight of the past in v1's average.
    """

    def __init__(
        self,
        ranges: Sequence[tuple[int, int]] = (),
        *,
        per_timestep: bool = False,
        momentum: float = V1_MOMENTUM,
    ) -> None:
        self.ranges = tuple(ranges)
        self.momentum = momentum
        self.maximum: Tensor | None = None
        self.by_timestep: dict[float, Tensor] = {}
        self.averages: list[Tensor | None] = [None] * len(self.ranges)
        self._per_timestep = per_timestep

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch."""
        per_item = x.detach().abs().amax(dim=1).float()  # [batch, channels]
        self.maximum = _larger(self.maximum, per_item.amax(dim=0))
        if self._per_timestep:
            for time in sorted(set(timesteps.tolist())):
                rows = per_item[timesteps == time].amax(dim=0)
                self.by_timestep[time] = _larger(self.by_timestep.get(time), rows)
        for index, (low, high) in enumerate(self.ranges):
            inside = (timesteps >= low) & (timesteps <= high)
            if inside.any():
                self.averages[index] = self._average(self.averages[index], per_item[inside].mean(dim=0))

    def floored(self, minimum: float = V2_FLOOR) -> Tensor:
        """Return `maximum` [channels] with small values raised to `minimum`.

        Raises:
            ValueError: nothing has been seen.
        """
        if self.maximum is None:
            raise ValueError("no batch has been seen")
        return self.maximum.clamp_min(minimum)

    def range_averages(self) -> Tensor:
        """Return v1's statistic [ranges, channels], zeros replaced by 1e-5.

        Raises:
            ValueError: no call fell into one of the ranges.
        """
        for bounds, average in zip(self.ranges, self.averages, strict=True):
            if average is None:
                raise ValueError(f"no calibration call has a timestep in {bounds[0]} to {bounds[1]}")
        stacked = torch.stack([average for average in self.averages if average is not None])
        return torch.where(stacked == 0, V1_ZERO, stacked)

    def _average(self, past: Tensor | None, now: Tensor) -> Tensor:
        return now if past is None else self.momentum * past + (1 - self.momentum) * now


class TokenAbsMax:
    """Largest magnitude of every token position, per timestep: what a per-token scale has to span."""

    def __init__(self) -> None:
        self.by_timestep: dict[float, Tensor] = {}

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch; the number of tokens is the same in all batches."""
        per_item = x.detach().abs().amax(dim=2).float()  # [batch, tokens]
        for time in sorted(set(timesteps.tolist())):
            rows = per_item[timesteps == time].amax(dim=0)
            self.by_timestep[time] = _larger(self.by_timestep.get(time), rows)

    def spread(self) -> dict[float, float]:
        """Return timestep -> largest token maximum divided by the mean token maximum."""
        return {
            time: float(values.max() / values.mean().clamp_min(torch.finfo(torch.float32).tiny))
            for time, values in sorted(self.by_timestep.items())
        }


class Gram:
    """Sum of x^T x over all tokens, [channels, channels] float32: the second moment of the input."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.rows = 0

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if self.matrix is None:
            self.matrix = flat.new_zeros(x.shape[-1], x.shape[-1])
        self.matrix.addmm_(flat.T, flat)
        self.rows += len(flat)

    def mean(self) -> Tensor:
        """Return the average of x^T x per token.

        Raises:
            ValueError: nothing has been seen.
        """
        if self.matrix is None:
            raise ValueError("no batch has been seen")
        return self.matrix / self.rows


class RowSample:
    """A uniform sample of all tokens seen (reservoir sampling, algorithm R).

    Args:
        size: rows to keep.
        generator: CPU generator; decides which.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        if size < 1:
            raise ValueError(f"size {size} is not at least 1")
        self.size = size
        self.seen = 0
        self._generator = generator
        self._rows: Tensor | None = None
        self._timesteps = torch.zeros(size)

    def update(self, x: Tensor, timesteps: Tensor) -> None:
        """Take one batch."""
        flat = x.detach().reshape(-1, x.shape[-1])
        times = timesteps.cpu().float().repeat_interleave(x.shape[1])
        if self._rows is None:
            self._rows = flat.new_zeros(self.size, x.shape[-1])
        # The row that is number j (from 0) overall takes the place floor(u * (j + 1)), if there is one.
        number = torch.arange(self.seen, self.seen + len(flat), dtype=torch.float64)
        drawn = torch.rand(len(flat), generator=self._generator, dtype=torch.float64)
        place = torch.where(number < self.size, number, torch.floor(drawn * (number + 1)))
        winners = {int(slot): row for row, slot in enumerate(place.tolist()) if slot < self.size}
        if winners:  # of several rows for one place the last stays, as if they had come one by one
            slots, rows = torch.tensor(list(winners)), torch.tensor(list(winners.values()))
            self._rows[slots.to(flat.device)] = flat[rows.to(flat.device)]
            self._timesteps[slots] = times[rows]
        self.seen += len(flat)

    @property
    def rows(self) -> Tensor:
        """The sampled rows, [min(size, seen), channels] in the input's dtype."""
        if self._rows is None:
            raise ValueError("no batch has been seen")
        return self._rows[: min(self.size, self.seen)]

    @property
    def timesteps(self) -> Tensor:
        """The rows' timesteps, [min(size, seen)] float32."""
        return self._timesteps[: min(self.size, self.seen)]


def _larger(past: Tensor | None, now: Tensor) -> Tensor:
    return now if past is None else torch.maximum(past, now)
