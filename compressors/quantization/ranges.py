"""Static activation grids: found last, on the inputs that layers have once all weights are rounded.

The order is MixDQ's (arXiv 2405.17873): what a layer reads in the compressed model is what its
grid must cover. The inputs themselves stay in floating point meanwhile. What is left in floating
point for good has no grid, and a first token whose output is stored is never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ...calibration.base import Calibration
from ...errors import StageError
from ...models.base import OpenModel
from ...progress import Progress, step
from ...runtime import first_token, static
from ...runtime.linear import QuantizedLinear
from ...runtime.manifest import QuantizedModule
from ...runtime.modules import quantized_layers
from ...runtime.moe_names import expert_linear

Average = Literal["minmax", "ema"]
MOMENTUM = 0.95
"""Weight of the past in the moving average, as the original."""


class Range:
    """Least and greatest value of a layer's input, over all calls or as a moving average of theirs.

    Args:
        average: `minmax`: over all calls; `ema`: the first call's, from then on
            0.95 of what there is and 0.05 of the call's.
    """

    def __init__(self, average: Average) -> None:
        self.low: float = math.nan
        self.high: float = math.nan
        self.calls = 0
        self._average = average

    def update(self, low: float, high: float) -> None:
        """Take the ends of one call's input."""
        if self.calls == 0:
            self.low, self.high = low, high
        elif self._average == "ema":
            self.low = MOMENTUM * self.low + (1 - MOMENTUM) * low
            self.high = MOMENTUM * self.high + (1 - MOMENTUM) * high
        else:
            self.low = low if low < self.low or math.isnan(low) else self.low
            self.high = high if high > self.high or math.isnan(high) else self.high
        self.calls += 1


def unset(scheme: QuantizedModule) -> dict[str, Tensor]:
    """Return the tensors of a static grid that is not found yet: a layer with them gives NaN."""
    if scheme.activation is None or scheme.activation.scope != "tensor":
        return {}
    tensors = {"activation_scale": torch.full((1,), math.nan)}
    if not scheme.activation.symmetric:
        tensors["activation_zero_point"] = torch.zeros(1, dtype=torch.int16)
    return tensors


def is_static(layer: QuantizedLinear) -> bool:
    """Tell whether a layer's input has one stored grid."""
    return layer.activation_scale is not None


def fill_ranges(
    layers: Mapping[str, QuantizedLinear], replay: Callable[[], None], average: Average
) -> dict[str, tuple[float, float]]:
    """Find the grids of all static layers and store them in the layers.

    Args:
        layers: by name; those without a static grid are left alone.
        replay: runs the compressed model on the calibration; every call of a layer is one batch.
        average: see `Range`.

    Returns:
        layer -> (least, greatest) value that its grid covers, zero included; static layers alone.

    Raises:
        StageError: naming a layer that no call reaches, or whose inputs are all zero or not finite. An expert
            that no token meets takes the range of the others of its mixture.
    """
    static_layers = {name: layer for name, layer in layers.items() if is_static(layer)}
    if not static_layers:
        return {}
    found = {name: Range(average) for name in static_layers}
    with _watched(static_layers, found), torch.no_grad():
        replay()
    ends = {name: _ends(name, _seen(name, found)) for name in static_layers}
    for name, layer in static_layers.items():
        set_range(layer, *ends[name])
    return ends


def calibrate_ranges(
    model: OpenModel, calibration: Calibration, average: Average, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Do `fill_ranges` for a compressed model, replaying the calibration once; nothing without static layers.

    Raises:
        StageError: see `fill_ranges`.
    """
    layers = quantized_layers(model.module)
    if not any(is_static(layer) for layer in layers.values()):
        return {}

    def replay() -> None:
        calibration.observe(model, (), _nothing, progress)

    with step(progress, "activation ranges"):
        return fill_ranges(layers, replay, average)


def _nothing(name: str, x: Tensor, timesteps: Tensor) -> None:
    """Observe no layer: the ranges are taken where the layers quantize."""


def set_range(layer: QuantizedLinear, low: float, high: float) -> None:
    """Store the grid that covers low to high in a static layer."""
    activation = layer.scheme.activation
    assert activation is not None
    assert layer.activation_scale is not None
    scale, zero = static.grid_of_range(low, high, activation.bits, activation.symmetric)
    layer.activation_scale = scale.to(layer.activation_scale.device)
    if zero is not None:
        layer.activation_zero_point = zero.to(layer.activation_scale.device)


def read_rows(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Return what a layer quantizes of an input: transformed, and without a first token that it stores.

    Args:
        layer: linear, or a convolution.
        x: [..., tokens, in], or [batch, in, height, width].
    """
    if layer.scheme.kernel is not None:
        return x
    if layer.first_token_input is not None:
        x = x[..., 1:, :]
    return layer.transformed(x.reshape(-1, layer.in_features))


def ends_of(layer: QuantizedLinear, rows: Tensor) -> tuple[float, float]:
    """Return (least, greatest) value of what a layer quantizes of rows [M, in], windows of a convolution."""
    values = rows if layer.scheme.kernel is not None else layer.transformed(rows)
    low, high = values.aminmax()
    return float(low), float(high)


def _seen(name: str, found: Mapping[str, Range]) -> Range:
    """Return the range of a layer; of an expert that no token meets, that of the same layer of all others."""
    own, expert = found[name], expert_linear(name)
    if own.calls or expert is None:
        return own
    joined = Range("minmax")
    for other, seen in found.items():
        theirs = expert_linear(other)
        if theirs is not None and (theirs[0], theirs[2]) == (expert[0], expert[2]) and seen.calls:
            joined.update(seen.low, seen.high)
    return joined


def _ends(name: str, found: Range) -> tuple[float, float]:
    if found.calls == 0:
        raise StageError(
            f"{name}: no calibration input reaches it, so its static range is not known",
            hint="keep the layer in floating point, or use activation_scale: token",
        )
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        raise StageError(
            f"{name}: its inputs are not finite once the weights are quantized",
            hint="use more weight bits, or keep the layers before it in floating point",
        )
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    if low == high:
        raise StageError(
            f"{name}: its inputs are all zero in the calibration, so its static range is empty",
            hint="calibrate on more samples, or keep the layer in floating point",
        )
    return low, high


@contextmanager
def _watched(layers: Mapping[str, QuantizedLinear], found: Mapping[str, Range]) -> Iterator[None]:
    """Leave the layers' inputs in floating point for a while, and take their ends."""
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.floating_input())
            handle = layer.register_forward_pre_hook(_watch(found[name]), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _watch(found: Range) -> Callable[[QuantizedLinear, tuple[Any, ...], dict[str, Any]], None]:
    def see(layer: QuantizedLinear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        values = read_rows(layer, x)
        if values.numel():
            low, high = values.aminmax()
            found.update(float(low), float(high))

    return see


def off_the_stored(layer: QuantizedLinear, rows: Tensor) -> Tensor:
    """Return which of rows [M, in] are not the first token that a layer stores: bool [M]."""
    if layer.first_token_input is None:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return first_token.distance(rows, layer.first_token_input) > first_token.TOLERANCE
