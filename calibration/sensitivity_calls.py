"""The calls of the denoiser on which a sensitivity is measured: a few of the recorded ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..runtime.hashes import digest
from .diffusion import DiffusionCalibration


class Calls(Protocol):
    """Keyword arguments of forwards, on the CPU; a process that measures reads them for itself."""

    @property
    def key(self) -> str:
        """Content hash of everything that they depend on."""

    @property
    def seed(self) -> int:
        """Seed of the recording."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one call after the other, always the same ones in the same order."""


@dataclass(frozen=True)
class RecordedCalls:
    """Some of the calls of recorded trajectories, both halves of a guided one.

    Attributes:
        calibration: the recording; the folder stays where it is as long as this is used.
        steps: timesteps of each trajectory, at even distances; more than there are: all of them.
        samples: how many trajectories; None: all of them from `start` on.
        start: the first one: an allocation is compared on others than it was found on.
    """

    calibration: DiffusionCalibration
    steps: int
    samples: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start {self.start} is not at least 0")
        for name, value in (("steps", self.steps), ("samples", self.samples)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not at least 1")

    def __getstate__(self) -> dict[str, Any]:
        # The keeper of a temporary folder belongs to this process alone.
        return {**self.__dict__, "calibration": replace(self.calibration, keeper=None)}

    @property
    def seed(self) -> int:
        """Seed of the recording."""
        return self.calibration.seed

    @property
    def key(self) -> str:
        """Content hash of the recording and of the choice."""
        content = [self.calibration.key, self.steps, self.samples, *([self.start] if self.start else [])]
        return digest(content)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the calls, file by file, from the first timestep to the last."""
        wanted = self.calibration.samples if self.samples is None else self.samples
        halves = 2 if self.calibration.guided else 1
        before = self.start
        for path in self.calibration.files:
            if wanted <= 0:
                return
            calls = list(replace(self.calibration, files=(path,)).calls())
            batch = len(calls[0][self.calibration.latents]) // halves
            skipped = min(batch, before)
            taken = min(batch - skipped, wanted)
            before, wanted = before - skipped, wanted - taken
            if taken == 0:
                continue
            chosen = torch.arange(skipped, skipped + taken)
            rows = torch.cat([chosen + half * batch for half in range(halves)])
            for index in evenly(len(calls), self.steps):
                yield {name: _take(value, batch * halves, rows) for name, value in calls[index].items()}


def evenly(count: int, wanted: int) -> list[int]:
    """Return the middles of `wanted` equal parts of range(count); all of it where it is shorter."""
    if wanted >= count:
        return list(range(count))
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def _take(value: Any, batch: int, rows: Tensor) -> Any:
    """Take rows of every tensor, nested ones included, that has one per item of the batch."""
    if isinstance(value, Mapping):
        return {key: _take(item, batch, rows) for key, item in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == batch and len(rows) < batch:
        return value[rows]
    return value
