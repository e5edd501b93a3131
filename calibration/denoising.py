"""The loss of a denoiser on samples of its own: how well it predicts what noise was added.

Its calibration ends in clean latents. They are noised at several timesteps spread over the schedule, and
the error is taken of what the scheduler asks the model for. No training data is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import StageError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from .diffusion import DiffusionCalibration
from .diffusion_loss import PREDICTIONS
from .sampler import make_scheduler, place
from .seeds import generator_for

TIMESTEPS = 4
"""Timesteps of every sample: the middles of as many equal parts of the schedule."""


@dataclass(frozen=True, eq=False)
class DenoisingObjective:
    """Mean square error over the elements, summed over samples and timesteps.

    Attributes:
        calibration: recorded trajectories, which end in clean latents.
        kept: share of the signal that is left at each timestep of the schedule: [steps] float64.
        prediction: what the model is asked for, one of `PREDICTIONS`.
    """

    calibration: DiffusionCalibration
    kept: Tensor
    prediction: str

    @classmethod
    def of(cls, model: OpenModel, calibration: DiffusionCalibration) -> DenoisingObjective:
        """Read the schedule of a model's own scheduler.

        Raises:
            StageError: it adds noise in another way (flow matching).
        """
        scheduler = make_scheduler(model, None)
        kept = getattr(scheduler, "alphas_cumprod", None)
        prediction = scheduler.config.get("prediction_type")
        if kept is None or prediction not in PREDICTIONS:
            raise StageError(
                f"{model.source.id}: the denoising loss is not known for {type(scheduler).__name__}"
                f" with prediction_type {prediction!r}",
                hint="set importance to magnitude, which needs no loss",
            )
        return cls(calibration, kept.double(), str(prediction))

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Where noise is added: whole numbers within the schedule, from little noise to much."""
        steps = len(self.kept)
        return tuple((2 * index + 1) * steps // (2 * TIMESTEPS) for index in range(TIMESTEPS))

    @property
    def key(self) -> str:
        """Content hash of the samples, the schedule and the loss."""
        content = [self.calibration.key, "denoising", self.timesteps, self.kept.tolist(), self.prediction]
        return digest(content)

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
            for turn, time in enumerate(self.timesteps):
                if index * TIMESTEPS + turn >= start:
                    yield self._loss(model, clean, inputs, time, first), len(clean)
            first += len(clean)

    def _loss(self, model: OpenModel, clean: Tensor, inputs: dict[str, Any], time: int, first: int) -> Tensor:
        """Return the loss of a batch at one timestep; `first` is the number of its first sample."""
        seed = self.calibration.seed
        noise = torch.stack(
            [
                torch.randn(item.shape, generator=generator_for(seed, "denoising", first + row, time))
                for row, item in enumerate(clean)
            ]
        )
        signal, noisy = float(self.kept[time].sqrt()), float((1 - self.kept[time]).sqrt())
        call = {
            model.family.latents: signal * clean + noisy * noise,
            "timestep": torch.full((len(clean),), time, dtype=torch.int64),
            **inputs,
        }
        output = model.module(**place(call, model.module), return_dict=False)[0].float()
        wanted = {
            "epsilon": noise, "sample": clean, "v_prediction": signal * noise - noisy * clean
        }[self.prediction]  # fmt: skip
        # Models that learn their variance predict it in further channels, which this loss leaves alone.
        error: Tensor = output[:, : clean.shape[1]] - wanted.to(output.device)
        return error.square().flatten(1).mean(dim=1).sum()
