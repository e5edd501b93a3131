"""The Gaussian steps of a diffusion: what lies between two timesteps, and how well a model knows it."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

Gaussian = tuple[Tensor, Tensor]
"""(mean, logarithm of the variance), of equal or broadcastable shapes."""

_BIN = 1.0 / 255.0
"""Half the width of the bins that images of eight bits have in [-1, 1]."""
_EDGE = 0.999
_LEAST_SHARE = 1e-12


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise at each timestep.

    Attributes:
        kept: share of the signal that is left: [steps] float64, falling.
    """

    kept: Tensor

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> Schedule:
        """Take over what a scheduler of diffusers has."""
        return cls(alphas_cumprod.detach().cpu().double())

    def __len__(self) -> int:
        """Return the number of timesteps."""
        return len(self.kept)

    def levels(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of sample and noise: [b, 1, ...] each, as many axes as `like`."""
        kept = self.kept[timestep]
        return _as(kept.sqrt(), like), _as((1 - kept).sqrt(), like)

    @property
    def _added(self) -> Tensor:
        """Variance that each step adds: [steps]."""
        before = torch.cat([torch.ones(1, dtype=self.kept.dtype), self.kept[:-1]])
        return 1 - self.kept / before

    def posterior(self, clean: Tensor, noisy: Tensor, timestep: Tensor) -> Gaussian:
        """Return the distribution of the state one step before: mean like `clean`, variance [b, 1, ...].

        At timestep 0 the variance is 0, and that of timestep 1 stands in its place.

        Args:
            clean: [b, ...], the sample, or what a model takes for it.
            noisy: the same shape, the state at `timestep`; on any device.
            timestep: [b] int64.
        """
        before = torch.cat([torch.ones(1, dtype=self.kept.dtype), self.kept[:-1]])
        kept, earlier, added = self.kept[timestep], before[timestep], self._added[timestep]
        of_clean = added * earlier.sqrt() / (1 - kept)
        of_noisy = (1 - earlier) * (1 - added).sqrt() / (1 - kept)
        mean = _as(of_clean, clean) * clean + _as(of_noisy, clean) * noisy.to(clean.device)
        return mean, _as(self._least_variance(timestep), clean)

    def _least_variance(self, timestep: Tensor) -> Tensor:
        before = torch.cat([torch.ones(1, dtype=self.kept.dtype), self.kept[:-1]])
        variance = self._added * (1 - before) / (1 - self.kept)
        return variance[timestep.clamp_min(min(1, len(self) - 1))].log()

    def learned_variance(self, place: Tensor, timestep: Tensor) -> Tensor:
        """Return the logarithm of a variance between the posterior's and that of the added noise.

        Args:
            place: [b, ...], -1 the smaller one, 1 the larger one.
            timestep: [b] int64.
        """
        low, high = self._least_variance(timestep), self._added[timestep].log()
        share = (place + 1) / 2
        return share * _as(high, place) + (1 - share) * _as(low, place)


def variance_bound(found: Gaussian, target: Gaussian, clean: Tensor, timestep: Tensor) -> Tensor:
    """Return how many bits per element a model's step costs: [b].

    The divergence of what it says from the target; at timestep 0 instead how likely the sample itself is,
    in bins of eight bits.

    Args:
        found: of the model.
        target: the true step, or a teacher's.
        clean: [b, ...], the samples.
        timestep: [b] int64.
    """
    divergence = _divergence(target, found).flatten(1).mean(dim=1)
    surprise = -_log_likelihood(clean, found).flatten(1).mean(dim=1)
    first = (timestep == 0).to(divergence.device)
    return torch.where(first, surprise, divergence) / log(2.0)


def _divergence(one: Gaussian, other: Gaussian) -> Tensor:
    """KL(one || other), element by element."""
    (mean, variance), (other_mean, other_variance) = one, other
    apart = (mean - other_mean).square() * torch.exp(-other_variance)
    return 0.5 * (other_variance - variance - 1.0 + torch.exp(variance - other_variance) + apart)


def _log_likelihood(clean: Tensor, found: Gaussian) -> Tensor:
    """Logarithm of the share of a Gaussian that lies in the bin of each value; the outer bins are open."""
    mean, variance = found
    scale = torch.exp(-0.5 * variance)
    above, below = scale * (clean - mean + _BIN), scale * (clean - mean - _BIN)
    between = (torch.special.ndtr(above) - torch.special.ndtr(below)).clamp_min(_LEAST_SHARE).log()
    lowest, highest = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(clean < -_EDGE, lowest, torch.where(clean > _EDGE, highest, between))


def _as(values: Tensor, like: Tensor) -> Tensor:
    """Return [b] numbers as float32 [b, 1, ...] where `like` is."""
    return values.float().to(like.device).view(-1, *(1 for _ in like.shape[1:]))
