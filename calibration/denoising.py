"""The loss of a denoiser on samples of its own: how well it predicts what it was trained to predict.

Its calibration ends in clean latents. They are noised at several levels, spread over those that it was
trained at, and the error is taken of what it is asked for. No training data is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.base import OpenModel
from ..models.latent_sizes import any_size
from ..runtime.hashes import digest
from .diffusion import DiffusionCalibration
from .diffusion_loss import DiffusionTask, task_for
from .sampler import place
from .seeds import generator_for, normal_rows

TIMESTEPS = 4
"""Timesteps of every sample: the middles of as many equal parts of the levels that a model is trained at."""


@dataclass(frozen=True, eq=False)
class DenoisingObjective:
    """Mean square error over the elements, summed over samples and timesteps.

    Attributes:
        calibration: recorded trajectories, which end in clean latents.
        task: how noise is added, and what is predicted.
    """

    calibration: DiffusionCalibration
    task: DiffusionTask

    @classmethod
    def of(cls, model: OpenModel, calibration: DiffusionCalibration, instead: str) -> DenoisingObjective:
        """Read how a model was trained from its own scheduler.

        Args:
            model: any denoiser.
            calibration: of the model.
            instead: see `diffusion_loss.task_for`.

        Raises:
            StageError: it was trained in a way that is not known.
        """
        shape = calibration.image_shape() if any_size(model.config) else None
        return cls(calibration, task_for(model, instead, shape))

    @property
    def _shares(self) -> Tensor:
        return (2 * torch.arange(TIMESTEPS, dtype=torch.float64) + 1) / (2 * TIMESTEPS)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Where noise is added, from little noise to much; of diffusion whole numbers."""
        return tuple(self.task.timesteps(self._shares).tolist())

    @property
    def key(self) -> str:
        """Content hash of the samples, the schedule and the loss."""
        return digest([self.calibration.key, "denoising", self.timesteps, *self.task.content])

    @property
    def samples(self) -> int:
        """How many pairs of a sample and a timestep there are."""
        return self.calibration.samples * TIMESTEPS

    @property
    def parts(self) -> int:
        """A part is one timestep of one batch."""
        return len(self.calibration.files) * TIMESTEPS

    def losses(self, model: OpenModel, start: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yield (loss, samples) part by part; see `objectives.Objective.losses`."""
        first = 0
        for index, (clean, inputs) in enumerate(self.calibration.clean()):
            for turn in range(TIMESTEPS):
                if index * TIMESTEPS + turn >= start:
                    yield self._loss(model, clean, inputs, turn, first), len(clean)
            first += len(clean)

    def _loss(self, model: OpenModel, clean: Tensor, inputs: dict[str, Any], turn: int, first: int) -> Tensor:
        """Return the loss of a batch at one of the timesteps; `first` is the number of its first sample."""
        seed, time = self.calibration.seed, int(self.timesteps[turn])
        generators = (generator_for(seed, "denoising", first + row, time) for row in range(len(clean)))
        noise = normal_rows(clean.shape[1:], generators)
        noised = self.task.noised(clean, inputs, self._shares[turn].expand(len(clean)), noise)
        output = model.module(**place(noised.call, model.module), return_dict=False)[0]
        return self.task.errors(output, noised).sum()
