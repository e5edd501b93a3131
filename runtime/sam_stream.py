"""What must agree in a Segment Anything encoder that was cut: the residual stream, and every feed-forward.

`surgery` looks at one module at a time. A folder whose modules are each whole and do not fit together would
open, and fail in the first forward with an error of torch's that names no file.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..errors import SourceError
from .attention_sizes import HINT

_ENCODER = "vision_encoder"


def check_stream(module: nn.Module) -> None:
    """Refuse an encoder whose modules disagree about a width; modules without such an encoder pass.

    Args:
        module: stock, of any sizes; no value is read.

    Raises:
        SourceError: naming the parameter and both widths.
    """
    encoder = dict(module.named_children()).get(_ENCODER)
    layers = None if encoder is None else dict(encoder.named_children()).get("layers")
    if encoder is None or layers is None:
        return
    width = encoder.get_parameter("patch_embed.projection.weight").shape[0]
    for name, axis in _of_stream(encoder, layers):
        found = encoder.get_parameter(name).shape[axis]
        if found != width:
            raise SourceError(
                f"{_ENCODER}.{name}: {found} channels, and the residual stream has {width}", hint=HINT
            )
    for index, _ in layers.named_children():
        inner = encoder.get_parameter(f"layers.{index}.mlp.lin1.weight").shape[0]
        found = encoder.get_parameter(f"layers.{index}.mlp.lin2.weight").shape[1]
        if found != inner:
            raise SourceError(
                f"{_ENCODER}.layers.{index}.mlp: {inner} channels go into its middle and {found} come out",
                hint=HINT,
            )


def _of_stream(encoder: nn.Module, layers: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield every parameter that has a channel of the residual stream on an axis, with the axis."""
    if encoder._parameters.get("pos_embed") is not None:
        yield "pos_embed", -1
    for index, _ in layers.named_children():
        layer = f"layers.{index}"
        yield from ((f"{layer}.layer_norm1.weight", 0), (f"{layer}.attn.qkv.weight", 1))
        yield from ((f"{layer}.attn.proj.weight", 0), (f"{layer}.layer_norm2.weight", 0))
        yield from ((f"{layer}.mlp.lin1.weight", 1), (f"{layer}.mlp.lin2.weight", 0))
    yield "neck.conv1.weight", 1
