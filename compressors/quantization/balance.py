"""Static-dynamic channel balance: which scale and which rotation a group of layers gets.

With a_c the largest magnitude of input channel c and w_c that of the weight's column, the input is
multiplied by m_c = w_c^(1-e) / a_c^e and the weight's columns divided by it (arXiv 2406.02540, its v2
`alpha` is 1 - e; SmoothQuant, arXiv 2211.10438, has e as `alpha`). Then both are rotated, and only
then is anything rounded: m first, R second, one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ...runtime.integer import fake_quantize_tokens
from ...runtime.manifest import ActivationScheme
from ...runtime.rotation import Rotation
from . import grid

SWEEP = tuple(index / 20 for index in range(21))
"""Exponents that a sweep tries, besides no scaling at all."""
ROTATION_GAIN_DB = 0.5
"""A rotation costs time at every step: `auto` takes it where the error falls by at least this much."""
_ACTIVATION_FLOOR = 1e-3
_WEIGHT_FLOOR = 1e-5
_SAMPLED_OUTPUTS = 256
_SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Transform:
    """What happens to a group's input before it is rounded.

    Attributes:
        exponent: of the activation; None without a scale.
        scale: m [in] float32, at least 1; None without.
        sign: +-1 int8 [in] of the rotation; None without.
        block: of the rotation.
    """

    exponent: float | None = None
    scale: Tensor | None = None
    sign: Tensor | None = None
    block: int | None = None

    def on_inputs(self, x: Tensor) -> Tensor:
        """Return x m R for float32 rows x [..., in]."""
        x = x if self.scale is None else x * self.scale
        return x if self.rotation is None else self.rotation(x)

    def on_weight(self, weight: Tensor) -> Tensor:
        """Return W / m R for float32 weight [out, in]."""
        weight = weight if self.scale is None else weight / self.scale
        return weight if self.rotation is None else self.rotation(weight)

    def on_gram(self, gram: Tensor) -> Tensor:
        """Return the Gram matrix of x m R from that of x: float32 [in, in]."""
        if self.scale is not None:
            gram = gram * self.scale * self.scale.unsqueeze(-1)
        return gram if self.rotation is None else self.rotation(self.rotation(gram).t().contiguous())

    @property
    def rotation(self) -> Rotation | None:
        """The rotation, built anew from its signs."""
        return None if self.sign is None or self.block is None else Rotation(self.sign, self.block)


def channel_scale(activation_max: Tensor, weight_max: Tensor, exponent: float) -> Tensor:
    """Return m with m_c proportional to w_c^(1-e) / a_c^e.

    A constant factor changes no rounding, so m is divided by its smallest value: a producer in half
    precision that absorbs factors of at least 1 (as 1 + shift terms) loses no digits.

    Args:
        activation_max: [in], largest magnitude per channel.
        weight_max: [in], largest magnitude per weight column.
        exponent: e, 0 to 1.

    Returns:
        float32 [in], smallest value 1.
    """
    activation = activation_max.double().clamp_min(_ACTIVATION_FLOOR)
    weight = weight_max.double().clamp_min(_WEIGHT_FLOOR)
    logarithm = (1.0 - exponent) * weight.log() - exponent * activation.log()
    return (logarithm - logarithm.min()).exp().float()


@dataclass(frozen=True)
class Layer:
    """A sample of one layer of a group.

    Attributes:
        weight: float32 [some outputs, in].
        rows: float32 [some rows, in], inputs before the transform.
    """

    weight: Tensor
    rows: Tensor


def sampled(weight: Tensor, rows: Tensor) -> Layer:
    """Keep evenly spread output channels and rows: enough to compare transforms by."""
    step = max(1, math.ceil(weight.shape[0] / _SAMPLED_OUTPUTS))
    skip = max(1, math.ceil(rows.shape[0] / _SAMPLED_ROWS))
    return Layer(weight[::step].float(), rows[::skip].float())


def output_error(
    layers: Sequence[Layer], transform: Transform, kind: grid.Grid, activation: ActivationScheme | None
) -> float:
    """Return the summed squared output error of a group under a transform, all quantizers real.

    Args:
        layers: that share the transform.
        transform: to judge.
        kind: the weights' grid.
        activation: grid of the inputs; None leaves them.
    """
    total = 0.0
    for layer in layers:
        inputs = transform.on_inputs(layer.rows)
        if activation is not None:
            # Rows that share one grid are rounded as one row.
            rows = inputs.reshape(1, -1) if activation.scope == "tensor" else inputs
            rows = fake_quantize_tokens(rows, activation.bits, activation.symmetric)
            inputs = rows.view(inputs.shape)
        weight = grid.dequantize(grid.quantize(transform.on_weight(layer.weight), kind))
        total += float((inputs @ weight.t() - layer.rows @ layer.weight.t()).double().square().sum())
    return total


def _least(candidates: Sequence[Transform], error: Callable[[Transform], float]) -> tuple[Transform, float]:
    scored = [(error(candidate), index) for index, candidate in enumerate(candidates)]
    least, index = min(scored)
    return candidates[index], least


@dataclass(frozen=True)
class Question:
    """What a group leaves open.

    Attributes:
        exponents: candidates; None stands for no scale.
        blocks: candidate rotation blocks; None stands for no rotation.
        sign: the signs of the rotation, int8 [in].
    """

    exponents: Sequence[float | None]
    blocks: Sequence[int | None]
    sign: Tensor


def choose_transform(
    question: Question,
    activation_max: Tensor,
    weight_max: Tensor,
    layers: Sequence[Layer],
    kind: grid.Grid,
    activation: ActivationScheme | None,
) -> Transform:
    """Choose scale and rotation of a group by its output error on calibration rows.

    For each rotation candidate the exponent is swept anew, because the best one moves. Where both
    are candidates, rotating must beat not rotating by `ROTATION_GAIN_DB`.

    Args:
        question: the candidates; where there is one of each, nothing is measured.
        activation_max: [in], the statistic of the scale.
        weight_max: [in], largest magnitude per weight column over the whole group.
        layers: samples of the layers that share the transform.
        kind: the weights' grid.
        activation: grid of the inputs.
    """

    def candidate(exponent: float | None, block: int | None) -> Transform:
        scale = None if exponent is None else channel_scale(activation_max, weight_max, exponent)
        return Transform(exponent, scale, None if block is None else question.sign, block)

    if len(question.exponents) == len(question.blocks) == 1:
        return candidate(question.exponents[0], question.blocks[0])
    chosen: Transform | None = None
    least = 0.0
    gain = 10.0 ** (ROTATION_GAIN_DB / 10.0)
    for block in question.blocks:
        candidates = [candidate(exponent, block) for exponent in question.exponents]
        best, value = _least(candidates, lambda item: output_error(layers, item, kind, activation))
        if chosen is None or value * gain <= least:
            chosen, least = best, value
    assert chosen is not None
    return chosen
