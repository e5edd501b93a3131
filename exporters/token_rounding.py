"""Linear layers as the package compressed-tensors computes them: floats that were rounded to a grid.

Its arithmetic (version 0.20) is floating point in the model's own dtype throughout. Weights are the
integers times the scale, unpacked before the first forward; an input row x of a layer with quantized
activations becomes s (q - z) with
- symmetric: s = max|x| / ((2^b - 1) / 2), q = round(clamp(x / s, -2^(b-1), 2^(b-1) - 1)), z = 0;
- asymmetric: s = (max(x, 0) - min(x, 0)) / (2^b - 1), z = round(clamp(-2^(b-1) - min(x, 0) / s)),
  q = round(clamp(x / s + z)).
A scale of zero becomes the dtype's epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.manifest import ActivationScheme


def rounded_rows(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return x rounded as above, in its own dtype.

    Args:
        x: [batch, tokens, channels] float, one scale per token; with fewer axes one scale for all of it,
            which is what the package does.
        bits: of a value.
        symmetric: which grid.
    """
    if x.numel() == 0:
        return x
    low, high = torch.aminmax(x) if x.ndim < 3 else (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))
    low, high = low.clamp_max(0), high.clamp_min(0)
    bottom, top = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    steps = torch.tensor(top - bottom).to(x.dtype)
    scale = torch.maximum(low.abs(), high.abs()) / (steps / 2) if symmetric else (high - low) / steps
    zero = torch.zeros_like(scale) if symmetric else (bottom - low / scale).clamp(bottom, top)
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    if symmetric:
        return (x / scale).clamp(bottom, top).round() * scale
    zero = zero.round().to(torch.int8).to(x.dtype)  # 0 / 0 of a row of zeros becomes 0
    return ((x / scale + zero).clamp(bottom, top).round() - zero) * scale


class UnpackedLinear(nn.Linear):
    """A linear layer of the package; its state dict has the tensors of the file, not what was unpacked.

    Args:
        weight: [out, in], unpacked.
        activation: grid of the input; None leaves it as it is.
        stored: the tensors of the layer in a file, by their names in it.
    """

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self, weight: Tensor, activation: ActivationScheme | None, stored: Mapping[str, Tensor]
    ) -> None:
        with torch.device("meta"):
            super().__init__(weight.shape[1], weight.shape[0], bias=False)
        del self.weight, self.bias
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", stored.get("bias"))
        self.activation = activation
        self._names = [name for name in stored if name != "bias"]
        for name in self._names:
            self.register_buffer(f"stored_{name}", stored[name], persistent=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names:
            destination[prefix + name] = getattr(self, f"stored_{name}")

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the input [..., in], rounded where that is asked for: [..., out]."""
        if self.activation is not None:
            input = rounded_rows(input, self.activation.bits, self.activation.symmetric)
        return F.linear(input, self.weight, self.bias)
