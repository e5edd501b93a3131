"""One layer from its floating-point weight: transformed in float32, rounded once, put in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...recipes.stages import GridSettings
from ...runtime import packing
from ...runtime.conv import QuantizedConv2d
from ...runtime.first_token import digest
from ...runtime.linear import QuantizedLinear
from ...runtime.manifest import QuantizedModule, RotationScheme
from ...runtime.modules import layer_class
from . import low_rank, ranges
from .balance import Transform
from .grid import Grid, QuantizedWeight, Steps, find_steps, rescaled, round_to_nearest
from .rounding import round_with_compensation
from .scheme import grid_of

_TEXT_ROWS = 64


@dataclass(frozen=True)
class Original:
    """A layer before it is rounded.

    Attributes:
        name: dotted, for errors.
        weight: float32 [out, in]; of a convolution [out, in * height * width].
        bias: [out] in the dtype it is stored in; None without.
        transform: of its input. A scale in it divides the weight's columns here.
        folded: the scale reaches the input through the layer's producer; the layer itself does not apply it.
        gram: float32 [in, in] of its inputs as they come, before the transform; None rounds to nearest.
        first_token: float32 [in], the token that its text starts with, as `weight` reads it; None where
            all tokens are computed.
    """

    name: str
    weight: Tensor
    bias: Tensor | None = None
    transform: Transform = Transform()
    folded: bool = False
    gram: Tensor | None = None
    first_token: Tensor | None = None

    @property
    def online(self) -> bool:
        """Whether the layer multiplies its input when it runs."""
        return self.transform.scale is not None and not self.folded

    def as_read(self, x: Tensor) -> Tensor:
        """Return inputs [..., in] of `weight` as the quantized layer will read them."""
        scale = self.transform.scale
        return x if self.online or scale is None else x * scale.to(x.device)


def settled(planned: QuantizedModule, original: Original) -> QuantizedModule:
    """Return a planned scheme with the transforms, and the first token, that were decided on data."""
    block = original.transform.block
    rotation = RotationScheme(block=block) if block else None
    first = None
    if planned.first_token is not None and original.first_token is not None:
        sha256 = digest(original.as_read(original.first_token))
        first = planned.first_token.model_copy(update={"sha256": sha256})
    return planned.model_copy(
        update={"input_scale": original.online, "rotation": rotation, "first_token": first}
    )


def _stored_output(original: Original, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what a layer stores of the first token: the token, and the original layer's output for it."""
    assert original.first_token is not None
    token = original.first_token.to(original.weight.device)
    bias = None if original.bias is None else original.bias.detach().float()
    # Enough rows that the product is computed as it is for a whole text, to the last bit.
    output = nn.functional.linear(token.expand(_TEXT_ROWS, -1), original.weight, bias)[0]
    return {
        "first_token_input": original.as_read(token).contiguous(),
        "first_token_output": output.to(dtype).contiguous(),
    }


def rounded(
    original: Original, scheme: QuantizedModule, settings: GridSettings, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Transform and round a weight once; return the layer's tensors, bias aside.

    Args:
        original: the layer.
        scheme: of `settled`.
        settings: of the stage.
        dtype: of the low-rank branch.

    Raises:
        StageError: see `rounding.round_with_compensation`.
    """
    tensors: dict[str, Tensor] = {}
    transform, weight = original.transform, original.weight
    if transform.scale is not None:
        weight = weight / transform.scale
    if scheme.low_rank:
        down, up = low_rank.split(weight, scheme.low_rank, dtype)
        if original.online and transform.scale is not None:
            # The branch sees the raw input, so its first half carries the scale.
            down = (down.float() * transform.scale).to(down.dtype)
            weight = weight - up.float() @ (down.float() / transform.scale)
        else:
            weight = weight - up.float() @ down.float()
        tensors["low_rank_down"], tensors["low_rank_up"] = down, up
    if transform.rotation is not None and transform.sign is not None:
        weight = transform.rotation(weight)
        tensors["rotation_sign"] = transform.sign
    if original.online and transform.scale is not None:
        tensors["input_scale"] = transform.scale
    gram = None if original.gram is None else transform.on_gram(original.gram)
    kind = grid_of(settings, scheme)
    q, steps = _round(original.name, weight, kind, gram)
    if settings.rescale:
        steps = rescaled(weight, QuantizedWeight(q, steps), kind, gram)
    tensors["qweight"] = q if scheme.bits == 8 else packing.pack(q, scheme.bits)
    tensors["scale"] = steps.scale
    if steps.zero is not None:
        tensors["zero_point"] = steps.zero
    if scheme.first_token is not None:
        tensors |= _stored_output(original, dtype)
    return tensors


def _round(name: str, weight: Tensor, kind: Grid, gram: Tensor | None) -> tuple[Tensor, Steps]:
    """Find the grid and round: to nearest, or with compensation where there is a Gram matrix."""
    if gram is None:
        steps = find_steps(weight, kind)
        return round_to_nearest(weight, steps, kind), steps
    steps = find_steps(weight, kind, gram.diagonal())
    return round_with_compensation(weight, gram, steps, kind, name), steps


def layer_of(
    scheme: QuantizedModule, dtype: torch.dtype, tensors: dict[str, Tensor], bias: Tensor | None
) -> QuantizedLinear:
    """Return the module of a scheme around its tensors; a static grid of its input is yet to be found."""
    tensors = {**ranges.unset(scheme), **tensors}
    if bias is not None:
        tensors = {**tensors, "bias": bias.detach()}
    return layer_class(scheme).from_tensors(scheme, dtype, tensors)


def put(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of what `name` is now."""
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)


def output_sqnr_db(original: Original, layer: QuantizedLinear, rows: Tensor) -> float | None:
    """Return how close a layer comes on its own inputs: 10 log10 of signal over error power, at most 200.

    None where there are no inputs.

    Args:
        original: what it was made of.
        layer: what it became.
        rows: float32 [rows, in], inputs before the transform; windows of a convolution. A first token
            whose output is stored does not count, and a static grid is the one of these rows.
    """
    if not len(rows):
        return None
    rows = rows[ranges.off_the_stored(layer, original.as_read(rows))]
    seen = original.as_read(rows)
    if ranges.is_static(layer):
        ranges.set_range(layer, *ranges.ends_of(layer, seen))
    bias = None if original.bias is None else original.bias.detach().float()
    exact = nn.functional.linear(rows, original.weight, bias)
    found = (
        layer.reference_windows(seen) if isinstance(layer, QuantizedConv2d) else layer.reference_rows(seen)
    )
    signal = float(exact.double().square().sum())
    error = float((exact - found).double().square().sum())
    if error <= signal * 1e-20:
        return 200.0
    return round(10.0 * float(torch.log10(torch.tensor(signal / error, dtype=torch.float64))), 3)
