"""Take channels out of a Segment Anything encoder, and say what is left.

The residual stream is cut everywhere it goes, so norms see fewer channels: that changes the function, and
training mends it. Heads and feed-forward networks are cut exactly: what is left computes what the model
with zeros in place of the removed channels computes.

For that, `preserve` multiplies the keys by sqrt(new / old channels of a head): the stock attention scales
by the new size, and its weights were trained with the old one. It has to be the keys, since the queries meet
the tables of relative positions unscaled. `reset` leaves the change of temperature in, as the official code.

`slice` keeps of these tables the columns of the channels that stay, which is exact; `zero` starts them anew,
as the official code does after both cuts, because its tracer could not follow them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....errors import StageError
from ....models.base import OpenModel
from ....runtime.manifest import ModuleSurgery
from ....runtime.sam_sizes import SamEncoder, sam_encoder
from ....runtime.surgery import follow_weight
from ..cutting import AttentionScale, surgery_of
from .sites import ENCODER, NECK, PATCHES, TABLES, LayerSites, embedding_slices, encoder_sites

Tables = Literal["slice", "zero"]
Shape = tuple[int, ...]


def cut_embedding(model: OpenModel, kept: Tensor, *, rel_pos: Tables) -> None:
    """Cut the residual stream in place, and update `model.surgery`.

    Args:
        model: open, before quantization.
        kept: [n] int64, ascending: channels that stay.
        rel_pos: zero: start the tables of relative positions anew; slice: they stay as they are.

    Raises:
        StageError: the indices do not fit the module; nothing was changed.
    """
    slice_embedding(model.module, kept, rel_pos=rel_pos)
    model.surgery = surgery_of(model.module, model.family, model.config)


def cut_bottleneck(
    model: OpenModel,
    attention: Sequence[Tensor],
    inner: Sequence[Tensor],
    *,
    attn_scale: AttentionScale,
    rel_pos: Tables,
) -> None:
    """Cut heads and feed-forward networks in place, and update `model.surgery`; see `slice_bottleneck`.

    Raises:
        StageError: the indices do not fit the module; nothing was changed.
    """
    slice_bottleneck(model.module, attention, inner, attn_scale=attn_scale, rel_pos=rel_pos)
    model.surgery = surgery_of(model.module, model.family, model.config)


@torch.no_grad()
def slice_embedding(module: nn.Module, kept: Tensor, *, rel_pos: Tables) -> None:
    """Cut the residual stream of a `SamModel` in place; see `cut_embedding`.

    Raises:
        StageError: the indices do not fit the module; nothing was changed.
    """
    sites = encoder_sites(module)
    _check("the residual stream", kept, sites.width)
    for name, axis in embedding_slices(sites):
        _keep(module, name, axis, kept)
    if rel_pos == "zero":
        for layer in sites.layers:
            _zero_tables(module, layer)


@torch.no_grad()
def slice_bottleneck(
    module: nn.Module,
    attention: Sequence[Tensor],
    inner: Sequence[Tensor],
    *,
    attn_scale: AttentionScale,
    rel_pos: Tables,
) -> None:
    """Cut heads and feed-forward networks of a `SamModel` in place.

    Args:
        module: on any device, the meta device too.
        attention: per layer [n] int64, ascending: channels that stay of every head.
        inner: per layer [n] int64, ascending: inner channels that stay.
        attn_scale: preserve or reset, see above.
        rel_pos: slice or zero, see above.

    Raises:
        StageError: the indices do not fit the module; nothing was changed.
    """
    layers = encoder_sites(module).layers
    if not len(layers) == len(attention) == len(inner):
        raise StageError(
            f"the encoder has {len(layers)} layers; what stays names {len(attention)} attentions and"
            f" {len(inner)} feed-forward networks"
        )
    for layer, within, channels in zip(layers, attention, inner, strict=True):
        _check(f"the heads of {layer.name}", within, layer.head_dim)
        _check(f"the feed-forward network of {layer.name}", channels, layer.inner)
    for layer, within, channels in zip(layers, attention, inner, strict=True):
        _cut_attention(module, layer, within, fold=attn_scale == "preserve")
        if rel_pos == "zero":
            _zero_tables(module, layer)
        _keep(module, f"{layer.lin1}.weight", 0, channels)
        _keep(module, f"{layer.lin1}.bias", 0, channels)
        _keep(module, f"{layer.lin2}.weight", 1, channels)


def planned_surgery(
    config: Mapping[str, Any], width: int, head_dims: Sequence[int], inner: Sequence[int]
) -> dict[str, ModuleSurgery]:
    """Say what cuts will leave otherwise than the config implies, from sizes alone.

    Args:
        config: of the model, completed; from it the stock class is built.
        width: of the residual stream.
        head_dims: channels of a head, per layer.
        inner: channels inside the feed-forward network, per layer.

    Returns:
        What `model.surgery` is after the cuts.
    """
    encoder = sam_encoder(config)
    stock = _sizes(
        encoder, encoder.width, [encoder.head_dim] * encoder.layers, [encoder.inner] * encoder.layers
    )
    found: dict[str, ModuleSurgery] = {}
    for name, shapes in _sizes(encoder, width, head_dims, inner).items():
        changed = {key: shape for key, shape in shapes.items() if shape != stock[name][key]}
        attributes: dict[Any, int | float] = {}
        if name.endswith(".attn"):
            head_dim = head_dims[int(name.split(".")[-2])]
            attributes = {} if head_dim == encoder.head_dim else {"scale": head_dim**-0.5}
        if changed or attributes:
            found[name] = ModuleSurgery(shapes=changed, attributes=attributes)
    return found


def _sizes(
    encoder: SamEncoder, width: int, head_dims: Sequence[int], inner: Sequence[int]
) -> dict[str, dict[str, Shape]]:
    """Return module -> own parameter -> shape, of all that a cut may change, in the order of the module."""
    patch, side = encoder.patch, encoder.side
    sizes: dict[str, dict[str, Shape]] = {ENCODER: {}}
    if encoder.absolute_positions:
        sizes[ENCODER]["pos_embed"] = (1, side, side, width)
    sizes[PATCHES] = {"weight": (width, encoder.channels, patch, patch), "bias": (width,)}
    for layer in range(encoder.layers):
        sizes.update(_layer_sizes(encoder, layer, width, head_dims[layer], inner[layer]))
    sizes[NECK] = {"weight": (encoder.out_channels, width, 1, 1)}
    return sizes


def _layer_sizes(
    encoder: SamEncoder, layer: int, width: int, head_dim: int, inner: int
) -> Iterator[tuple[str, dict[str, Shape]]]:
    name, channels = f"{ENCODER}.layers.{layer}", encoder.heads * head_dim
    side = encoder.side if encoder.is_global(layer) else encoder.window
    bias: dict[str, Shape] = {"bias": (3 * channels,)} if encoder.qkv_bias else {}
    tables = TABLES if encoder.relative_positions else ()
    norm: dict[str, Shape] = {"weight": (width,), "bias": (width,)}
    yield f"{name}.layer_norm1", norm
    yield f"{name}.attn", dict.fromkeys(tables, (2 * side - 1, head_dim))
    yield f"{name}.attn.qkv", {"weight": (3 * channels, width), **bias}
    yield f"{name}.attn.proj", {"weight": (width, channels), "bias": (width,)}
    yield f"{name}.layer_norm2", norm
    yield f"{name}.mlp.lin1", {"weight": (inner, width), "bias": (inner,)}
    yield f"{name}.mlp.lin2", {"weight": (width, inner), "bias": (width,)}


def _check(what: str, kept: Tensor, size: int) -> None:
    found = kept.tolist()
    if not found or found != sorted(set(found)) or found[0] < 0 or found[-1] >= size:
        raise StageError(f"{what}: what stays must be some of {size} channels, in ascending order")


def _cut_attention(module: nn.Module, layer: LayerSites, within: Tensor, *, fold: bool) -> None:
    """Keep the same channels of every head; q, k and v are the thirds of one tensor."""
    heads, old, new = layer.heads, layer.head_dim, len(within)
    columns = (torch.arange(heads)[:, None] * old + within).flatten()
    rows = (torch.arange(3)[:, None] * heads * old + columns).flatten()
    for name in (f"{layer.qkv}.weight", f"{layer.qkv}.bias"):
        _keep(module, name, 0, rows)
    _keep(module, f"{layer.proj}.weight", 1, columns)
    for table in layer.tables:
        _keep(module, table, 1, within)
    if fold and new != old:
        for values in module.get_submodule(layer.qkv).parameters(recurse=False):
            keys = values[heads * new : 2 * heads * new]
            exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
            keys.copy_(exact * math.sqrt(new / old))
    # The sdpa attention of the library goes by the size of a head, whatever is set here.
    vars(module.get_submodule(layer.attention))["scale"] = new**-0.5


def _zero_tables(module: nn.Module, layer: LayerSites) -> None:
    for table in layer.tables:
        module.get_parameter(table).zero_()


def _keep(module: nn.Module, name: str, axis: int, positions: Tensor) -> None:
    """Index a parameter, where the module has it; it keeps its flag, and has no gradient."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    old = owner._parameters.get(leaf)
    if old is None:
        return
    values = old.detach().index_select(axis, positions.to(old.device)).contiguous()
    owner._parameters[leaf] = nn.Parameter(values, requires_grad=old.requires_grad)
    follow_weight(owner)
