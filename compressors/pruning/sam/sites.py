"""Where the channels of a Segment Anything encoder are, read off the module as it is now.

Names are those of the library's `SamModel`, and sizes are those of the weights, not of the config: a model
that was slimmed before reads like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ....errors import StageError

ENCODER = "vision_encoder"
PATCHES = f"{ENCODER}.patch_embed.projection"
POSITIONS = f"{ENCODER}.pos_embed"
NECK = f"{ENCODER}.neck.conv1"
TABLES = ("rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class LayerSites:
    """One layer of the encoder.

    Attributes:
        name: of its module.
        heads, head_dim: of its attention; the rows of `qkv` are [3, heads, head_dim].
        inner: channels between its feed-forward linears.
        window: side of its windows in tokens; 0: it attends to the whole image.
        relative: whether its attention has tables of relative positions, [positions, head_dim] each.
    """

    name: str
    heads: int
    head_dim: int
    inner: int
    window: int
    relative: bool

    @property
    def attention(self) -> str:
        """Name of the module that knows the scale, the heads and the tables."""
        return f"{self.name}.attn"

    @property
    def qkv(self) -> str:
        """Name of the fused linear, [3 * heads * head_dim, width]."""
        return f"{self.name}.attn.qkv"

    @property
    def proj(self) -> str:
        """Name of the linear [width, heads * head_dim]."""
        return f"{self.name}.attn.proj"

    @property
    def lin1(self) -> str:
        """Name of the linear [inner, width]."""
        return f"{self.name}.mlp.lin1"

    @property
    def lin2(self) -> str:
        """Name of the linear [width, inner]."""
        return f"{self.name}.mlp.lin2"

    @property
    def norms(self) -> tuple[str, str]:
        """Names of the norms over the width."""
        return f"{self.name}.layer_norm1", f"{self.name}.layer_norm2"

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables of relative positions."""
        return tuple(f"{self.attention}.{table}" for table in TABLES) if self.relative else ()


@dataclass(frozen=True)
class EncoderSites:
    """The encoder.

    Attributes:
        width: channels of the residual stream.
        layers: from the first to the last.
        absolute: whether there is a parameter of absolute positions, [1, side, side, width].
    """

    width: int
    layers: tuple[LayerSites, ...]
    absolute: bool

    @property
    def heads(self) -> int:
        """Heads of every layer."""
        return self.layers[0].heads


def encoder_sites(module: nn.Module) -> EncoderSites:
    """Read the sizes of the encoder.

    Args:
        module: a `SamModel`, perhaps cut, on any device.

    Raises:
        StageError: it is none, or its linears were replaced, as by quantization.
    """
    width = _weight(module, PATCHES, nn.Conv2d).shape[0]
    stacked = module.get_submodule(f"{ENCODER}.layers")
    layers = tuple(_layer(module, f"{ENCODER}.layers.{name}") for name, _ in stacked.named_children())
    if not layers:
        raise StageError(f"{ENCODER} has no layers")
    absolute = module.get_submodule(ENCODER)._parameters.get("pos_embed") is not None
    return EncoderSites(int(width), layers, absolute)


def embedding_slices(sites: EncoderSites) -> Iterator[tuple[str, int]]:
    """Yield (parameter, axis) of all that has the channels of the residual stream, each once.

    Biases are among them whether the module has them or not.
    """
    yield f"{PATCHES}.weight", 0
    yield f"{PATCHES}.bias", 0
    if sites.absolute:
        yield POSITIONS, 3
    for layer in sites.layers:
        for norm in layer.norms:
            yield f"{norm}.weight", 0
            yield f"{norm}.bias", 0
        yield f"{layer.qkv}.weight", 1
        yield f"{layer.lin1}.weight", 1
        for linear in (layer.proj, layer.lin2):
            yield f"{linear}.weight", 0
            yield f"{linear}.bias", 0
    yield f"{NECK}.weight", 1


def _layer(module: nn.Module, name: str) -> LayerSites:
    attention, layer = module.get_submodule(f"{name}.attn"), module.get_submodule(name)
    heads = vars(attention).get("num_attention_heads")
    rows = _weight(module, f"{name}.attn.qkv", nn.Linear).shape[0]
    if type(heads) is not int or heads < 1 or rows % (3 * heads):
        raise StageError(f"{name}.attn: {rows} rows of queries, keys and values make no {heads} heads")
    tables = attention._parameters.get(TABLES[0])
    return LayerSites(
        name,
        heads=heads,
        head_dim=int(rows // (3 * heads)),
        inner=int(_weight(module, f"{name}.mlp.lin1", nn.Linear).shape[0]),
        window=int(vars(layer).get("window_size", 0)),
        relative=tables is not None,
    )


def _weight(module: nn.Module, name: str, kind: type[nn.Module]) -> Tensor:
    try:
        child = module.get_submodule(name)
    except AttributeError:
        raise StageError(f"the model has no {name}: it is no Segment Anything model") from None
    if not isinstance(child, kind):
        raise StageError(
            f"{name} is a {type(child).__name__}, where a {kind.__name__} is cut",
            hint="slim before quantizing",
        )
    return child.get_parameter("weight")
