"""Makes one layer compute as one of its candidates: weights from the bank, or a rounded input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ....calibration.sensitivity_probe import Candidate, Layer
from ....runtime.integer import fake_quantize_tokens
from ....runtime.manifest import ActivationScheme, QuantizedModule
from ....runtime.rotation import Rotation
from .bank import Bank

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BankQuantizer:
    """A quantizer for `calibration.sensitivity`; picklable, and it never writes a weight.

    A weight's candidate is the very layer of the bank, its input left in floating point. An input's
    candidate is rounded where the layer rounds it, behind its channel scale and rotation, and multiplied
    by the original weight; a first token whose output the layer stores is not rounded.

    Attributes:
        bank: of the layers.
    """

    bank: Bank

    @contextmanager
    def __call__(self, name: str, layer: Layer, candidate: Candidate) -> Iterator[None]:
        """Let one layer compute as a candidate."""
        if candidate.kind == "weight":
            forward = self._with_weight(name, layer, candidate.label)
        else:
            forward = self._with_input(name, layer, ActivationScheme(**candidate.settings))
        layer.__dict__["forward"] = forward
        try:
            yield
        finally:
            del layer.__dict__["forward"]

    def _with_weight(self, name: str, layer: Layer, label: str) -> Forward:
        made = self.bank.layer(name, label, layer, {"activation": None})
        return lambda x: made.reference_forward(x).to(x.dtype)

    def _with_input(self, name: str, layer: Layer, activation: ActivationScheme) -> Forward:
        found = self.bank.read(name, self.bank.labels(name)[0])
        device = layer.weight.device
        scale, sign = (found.tensors.get(key) for key in ("input_scale", "rotation_sign"))
        rounding = Rounding(
            activation,
            None if scale is None else scale.to(device),
            _rotation(found.scheme, None if sign is None else sign.to(device)),
        )
        original: Forward = layer.forward
        if found.scheme.first_token is None:
            return lambda x: original(rounding(x))
        return lambda x: original(torch.cat([x[..., :1, :], rounding(x[..., 1:, :])], dim=-2))


def _rotation(scheme: QuantizedModule, sign: Tensor | None) -> Rotation | None:
    return None if sign is None or scheme.rotation is None else Rotation(sign, scheme.rotation.block)


@dataclass(frozen=True)
class Rounding:
    """Rounds an input on its grid and gives it back as if nothing had been scaled or rotated.

    A grid that calibration would find (`scope` tensor) is the one of each call's own range here.

    Attributes:
        activation: the grid.
        scale: of the input's channels, float32 [in]; None without.
        rotation: behind it; None without.
    """

    activation: ActivationScheme
    scale: Tensor | None = None
    rotation: Rotation | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [batch, ..., channels], or an image of a convolution, rounded; in its own dtype."""
        rows = x.float() if self.scale is None else x.float() * self.scale
        if self.rotation is not None:
            rows = self.rotation(rows)
        rows = self._rounded(rows)
        if self.rotation is not None:
            rows = self.rotation.inverse(rows)
        if self.scale is not None:
            rows = rows / self.scale
        return rows.to(x.dtype)

    def _rounded(self, rows: Tensor) -> Tensor:
        shapes = {"token": (-1, rows.shape[-1]), "sample": (len(rows), -1), "tensor": (1, -1)}
        flat = rows.reshape(shapes[self.activation.scope])
        return fake_quantize_tokens(flat, self.activation.bits, self.activation.symmetric).view(rows.shape)
