"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = d * average + (1 - d) * weights, in float32.

    In the first steps d is smaller, (1 + step) / (10 + step), so that the weights from before training do
    not weigh on a short run.

    Args:
        parameters: name -> float32 parameter, on their device.
        decay: the largest d.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in parameters.items()
        }

    def decay(self, step: int) -> float:
        """Return d of a step, counted from 0."""
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after `step`."""
        share = 1.0 - self.decay(step)
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter, share)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an average that was kept."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Make the average the weights."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.tensors[name])
