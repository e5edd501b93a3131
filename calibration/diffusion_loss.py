"""The training loss of a denoiser, as its kind was trained: on noised latents, at all noise levels.

Diffusion models predict the noise, the velocity (arXiv 2202.00512) or the sample; of those that learn their
variance too, in further channels, the bound of arXiv 2102.09672 trains it, and the mean takes no gradient
from there. Flow-matching models predict noise minus sample (arXiv 2210.02747), at levels drawn as in
arXiv 2403.03206. The stock classes come without these losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from ..errors import StageError
from ..models.base import OpenModel
from ..models.latent_sizes import latent_shape, learns_variance, tokens_of
from .captions import without_captions
from .label_dropout import drop_rate
from .sampler import make_scheduler
from .variance import Schedule, variance_bound

PREDICTIONS = ("epsilon", "v_prediction", "sample")
LABELS = "class_labels"


@dataclass(frozen=True)
class Noised:
    """Noised latents, and what the denoiser is called with; everything on the CPU.

    Attributes:
        call: keyword arguments of the denoiser; see `sampler.place`. Dropped labels are dropped there.
        clean: [b, C, H, W] float32.
        noise: the same shape, standard normal.
        noisy: what the denoiser sees.
        timestep: [b] int64; of flow matching float32 in (0, 1000).
    """

    call: dict[str, Any]
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.clean)


Generators = torch.Generator | Sequence[torch.Generator]
"""Of a batch, on the CPU: one for all items in turn, or one for each of them."""


class DiffusionTask(ABC):
    """How a denoiser is trained."""

    @property
    @abstractmethod
    def content(self) -> tuple[Any, ...]:
        """What noise is added and what is predicted, as JSON values."""

    @abstractmethod
    def timesteps(self, share: Tensor) -> Tensor:
        """Return where in the schedule items are noised: [b], see `Noised`.

        Args:
            share: [b] float64 in [0, 1): of the items that are trained on, so many have less noise.
        """

    @abstractmethod
    def noised(
        self,
        latents: Tensor,
        conditions: Mapping[str, Any],
        share: Tensor,
        noise: Tensor,
        dropped: Tensor | None = None,
    ) -> Noised:
        """Noise every item at a level of its own.

        Args:
            latents: [b, C, H, W] float32, clean, on the CPU.
            conditions: keyword arguments of the denoiser beside latents and timestep, b rows each.
            share: of `timesteps`.
            noise: like `latents`, standard normal.
            dropped: [b] in [0, 1), uniform: labels go where this is low; None: all of them stay.
        """

    def draw(
        self,
        latents: Tensor,
        conditions: Mapping[str, Any],
        generator: Generators,
        empty: Mapping[str, Tensor] | None = None,
    ) -> Noised:
        """Draw a noise level, noise, and whether its label or caption is dropped, for every item.

        Args:
            latents: [b, C, H, W] float32, clean, on the CPU.
            conditions: keyword arguments of the denoiser beside latents and timestep, b rows each.
            generator: with one for each item, what an item gets does not depend on the others.
            empty: what dropped captions become; see `LatentSet`.
        """
        share, dropped, noise = _numbers(latents, generator)
        if empty:
            conditions = without_captions(conditions, empty, dropped)
        return self.noised(latents, conditions, share, noise, dropped)

    @abstractmethod
    def errors(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the mean square error of the prediction alone for every item: [b] float32, with its graph.

        What a model says of its variance does not count.

        Args:
            output: [b, C or 2C, H, W], of the denoiser for `noised.call`.
            noised: of `noised` or `draw`.
        """

    @abstractmethod
    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the training loss of every item: [b] float32, with its graph.

        Args:
            output: [b, C or 2C, H, W], of the denoiser for `noised.call`.
            noised: of `draw`.
        """

    @abstractmethod
    def distillation_losses(self, output: Tensor, teacher: Tensor, noised: Noised) -> Tensor:
        """Return how far two denoisers are apart for every item: [b] float32.

        The mean square between their predictions, and where the variance is learned the divergence of the
        student's posterior from the teacher's; the student's mean takes no gradient from that.

        Args:
            output: of the denoiser that learns.
            teacher: of the other one, for the same `noised.call`; takes no gradient.
            noised: of `draw`.
        """

    def loss(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the mean of `losses`."""
        return self.losses(output, noised).mean()

    def distillation_loss(self, output: Tensor, teacher: Tensor, noised: Noised) -> Tensor:
        """Return the mean of `distillation_losses`."""
        return self.distillation_losses(output, teacher, noised).mean()


def task_for(model: OpenModel, instead: str = "", shape: Sequence[int] | None = None) -> DiffusionTask:
    """Return how a model is trained, by its scheduler and its config.

    Args:
        model: any denoiser.
        instead: what a stage can do without a loss, for the hint of the error.
        shape: (channels, height, width) of what it is trained on; None: of the model's usual images.

    Raises:
        StageError: the kind of scheduler or of prediction is not known.
    """
    import diffusers

    scheduler = make_scheduler(model, None)
    rate, null = drop_rate(model.module)
    inputs = _Inputs(model.family.latents, rate, null)
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        tokens = tokens_of(model.config, shape or latent_shape(model.config))
        return FlowTask(inputs, _shift(scheduler, tokens), int(scheduler.config.num_train_timesteps))
    kept = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type")
    if kept is None or prediction not in PREDICTIONS:
        known = f"known: flow matching, and diffusion with {', '.join(PREDICTIONS)}"
        raise StageError(
            f"{model.source.id}: no training loss is known for {type(scheduler).__name__} with"
            f" prediction_type {prediction!r}",
            hint=f"{known}; {instead}" if instead else known,
        )
    return NoiseTask(inputs, Schedule.of(kept), str(prediction), learns_variance(model.config))


def _shift(scheduler: Any, tokens: int) -> float:
    """Return what the odds of a level are multiplied by; larger images are noised more."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    low, high = config.base_image_seq_len, config.max_image_seq_len
    slope = (config.max_shift - config.base_shift) / (high - low)
    return exp(config.base_shift + slope * (tokens - low))


@dataclass(frozen=True)
class _Inputs:
    """How the arguments of a denoiser are made.

    Attributes:
        latents: name of the argument.
        rate: share of the class labels that is dropped.
        null: what they become.
    """

    latents: str
    rate: float
    null: int

    def call(
        self, noisy: Tensor, timestep: Tensor, conditions: Mapping[str, Any], dropped: Tensor | None
    ) -> dict[str, Any]:
        call = {self.latents: noisy, "timestep": timestep, **conditions}
        if dropped is not None and self.rate and LABELS in call:
            call[LABELS] = torch.where(dropped < self.rate, self.null, call[LABELS])
        return call


def _numbers(latents: Tensor, generator: Generators) -> tuple[Tensor, Tensor, Tensor]:
    """Return (uniform [b], uniform [b], normal like `latents`), item by item."""
    several = [generator] * len(latents) if isinstance(generator, torch.Generator) else generator
    uniform, noise = [], []
    for item, one in zip(latents, several, strict=True):
        uniform.append(torch.rand(2, generator=one, dtype=torch.float64))
        noise.append(torch.randn(item.shape, generator=one))
    level, dropped = torch.stack(uniform).unbind(1)
    return level, dropped, torch.stack(noise)


@dataclass(frozen=True)
class NoiseTask(DiffusionTask):
    """Diffusion; see `DiffusionTask`.

    Attributes:
        inputs: how the denoiser is called.
        schedule: how much noise there is at each timestep.
        prediction: what the first channels say, one of `PREDICTIONS`.
        learned: whether further channels say where the variance is between its bounds.
    """

    inputs: _Inputs
    schedule: Schedule
    prediction: str
    learned: bool

    @property
    def content(self) -> tuple[Any, ...]:
        """See `DiffusionTask`."""
        return self.schedule.kept.tolist(), self.prediction

    def timesteps(self, share: Tensor) -> Tensor:
        """Return whole numbers; all of the schedule are equally likely."""
        return (share * len(self.schedule)).long().clamp_max(len(self.schedule) - 1)

    def noised(
        self,
        latents: Tensor,
        conditions: Mapping[str, Any],
        share: Tensor,
        noise: Tensor,
        dropped: Tensor | None = None,
    ) -> Noised:
        """See `DiffusionTask`."""
        timestep = self.timesteps(share)
        signal, noisy = self.schedule.levels(timestep, latents)
        states = signal * latents + noisy * noise
        call = self.inputs.call(states, timestep, conditions, dropped)
        return Noised(call, latents, noise, states, timestep)

    def errors(self, output: Tensor, noised: Noised) -> Tensor:
        """See `DiffusionTask`."""
        prediction, _ = self._parts(output.float(), noised)
        return _mean_square(prediction - self._wanted(noised).to(output.device))

    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the mean square error, plus the bound where the variance is learned."""
        output = output.float()
        found = self.errors(output, noised)
        prediction, variance = self._parts(output, noised)
        if variance is None:
            return found
        clean = noised.clean.to(output.device)
        target = self.schedule.posterior(clean, noised.noisy, noised.timestep)
        return found + self._bound(prediction, variance, target, noised)

    def distillation_losses(self, output: Tensor, teacher: Tensor, noised: Noised) -> Tensor:
        """Return the mean square between the predictions, plus the bound with the teacher's posterior."""
        output, teacher = output.float(), teacher.detach().float()
        prediction, variance = self._parts(output, noised)
        wanted, wanted_variance = self._parts(teacher, noised)
        found = _mean_square(prediction - wanted)
        if variance is None or wanted_variance is None:
            return found
        mean, _ = self.schedule.posterior(self._clean(wanted, noised), noised.noisy, noised.timestep)
        target = mean, self.schedule.learned_variance(wanted_variance, noised.timestep)
        return found + self._bound(prediction, variance, target, noised)

    def _parts(self, output: Tensor, noised: Noised) -> tuple[Tensor, Tensor | None]:
        """Return (prediction, place of the variance between its bounds, or None)."""
        if not self.learned:
            return output, None
        channels = noised.clean.shape[1]
        return output[:, :channels], output[:, channels:]

    def _bound(
        self, prediction: Tensor, variance: Tensor, target: tuple[Tensor, Tensor], noised: Noised
    ) -> Tensor:
        clean = self._clean(prediction.detach(), noised)
        mean, _ = self.schedule.posterior(clean, noised.noisy, noised.timestep)
        found = mean, self.schedule.learned_variance(variance, noised.timestep)
        return variance_bound(found, target, noised.clean.to(mean.device), noised.timestep)

    def _wanted(self, noised: Noised) -> Tensor:
        if self.prediction == "v_prediction":
            signal, noisy = self.schedule.levels(noised.timestep, noised.clean)
            return signal * noised.noise - noisy * noised.clean
        return noised.noise if self.prediction == "epsilon" else noised.clean

    def _clean(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Return the sample that a prediction means."""
        if self.prediction == "sample":
            return prediction
        signal, noisy = self.schedule.levels(noised.timestep, prediction)
        state = noised.noisy.to(prediction.device)
        if self.prediction == "v_prediction":
            return signal * state - noisy * prediction
        return (state - noisy * prediction) / signal


@dataclass(frozen=True)
class FlowTask(DiffusionTask):
    """Flow matching; see `DiffusionTask`.

    Attributes:
        inputs: how the denoiser is called.
        shift: factor of the odds of a noise level.
        steps: the timestep of pure noise.
    """

    inputs: _Inputs
    shift: float
    steps: int

    @property
    def content(self) -> tuple[Any, ...]:
        """See `DiffusionTask`."""
        return "flow", self.shift, self.steps

    def timesteps(self, share: Tensor) -> Tensor:
        """Return float32; the logits of the levels are normal, then shifted."""
        return self._levels(share) * self.steps

    def _levels(self, share: Tensor) -> Tensor:
        logits = torch.special.ndtri(share.clamp(1e-6, 1 - 1e-6)) + log(self.shift)
        return torch.sigmoid(logits).float()

    def noised(
        self,
        latents: Tensor,
        conditions: Mapping[str, Any],
        share: Tensor,
        noise: Tensor,
        dropped: Tensor | None = None,
    ) -> Noised:
        """See `DiffusionTask`."""
        level = self._levels(share).view(-1, *(1 for _ in latents.shape[1:]))
        states = (1 - level) * latents + level * noise
        timestep = self.timesteps(share)
        call = self.inputs.call(states, timestep, conditions, dropped)
        return Noised(call, latents, noise, states, timestep)

    def errors(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the mean square error of the velocity."""
        return _mean_square(output.float() - (noised.noise - noised.clean).to(output.device))

    def losses(self, output: Tensor, noised: Noised) -> Tensor:
        """Return the same as `errors`: there is nothing else to learn."""
        return self.errors(output, noised)

    def distillation_losses(self, output: Tensor, teacher: Tensor, noised: Noised) -> Tensor:
        """Return the mean square between the velocities."""
        return _mean_square(output.float() - teacher.detach().float())


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(dim=1)
