"""Segment Anything (arXiv 2304.02643): an image encoder, a prompt encoder and a mask decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..runtime.manifest import ModuleSurgery
from ..runtime.sam_sizes import SAM_CLASSES, sam_encoder
from ..runtime.transformers_config import implied_copies
from .base import AS_CONFIGURED, Family, FoldGroup, LinearSite, Role, Shapes
from .native_config import Attributes, PrunedSizes
from .sam_macs import decoder_macs, encoder_macs
from .sam_shapes import (
    FINAL_ATTENTION,
    HYPERNETWORKS,
    LAYERS,
    PROJECTIONS,
    RATING,
    TO_IMAGE,
    TO_TOKENS,
    TWO_WAY,
    sam_tensors,
)
from .stock_module import stock_module
from .transformer import config_of, linear_shapes, random_normal, reference_of

_LAYER: tuple[tuple[str, Role], ...] = (
    ("attn.qkv", "attention.qkv"), ("attn.proj", "attention.out"),
    ("mlp.lin1", "ff.in"), ("mlp.lin2", "ff.out"),
)  # fmt: skip
_OWN: tuple[Role, ...] = ("attention.q", "attention.k", "attention.v", "attention.out")
_CROSS: tuple[Role, ...] = ("cross.q", "cross.k", "cross.v", "cross.out")


class SamFamily(Family):
    """Adapter. The reference input is one image of the config's size with one point.

    Its blocks are the layers of the image encoder; the decoder is kept as it is by all that compresses.
    """

    name = "sam"
    class_names = tuple(SAM_CLASSES)
    library = "transformers"
    task = "segment"
    tied = True
    compared = (0, 1)  # how the model rates its masks, and the masks

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module.

        Raises:
            SourceError: the config is refused, or the installed library builds the class otherwise.
        """
        return stock_module(config, dict(sam_tensors(config)))

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear in forward order with its role, quantized ones included.

        Raises:
            KeyError: a linear that no role covers: the stock class has changed.
        """
        shapes = dict(linear_shapes(module))
        found = [
            LinearSite(name, role, block, shapes.pop(name))
            for name, role, block in self._places(module)
            if name in shapes
        ]
        if shapes:
            raise KeyError(
                f"{next(iter(shapes))}: no role is known for this linear of a {type(module).__name__}"
            )
        return found

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The layers of the image encoder in forward order."""
        return [(f"{LAYERS}.{name}", layer) for name, layer in module.get_submodule(LAYERS).named_children()]

    def attentions(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules of the image encoder in forward order."""
        return [(f"{name}.attn", layer.get_submodule("attn")) for name, layer in self.blocks(module)]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """None: nothing that needs them quantizes this family."""
        return []

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random images [batch, channels, side, side], and a point [batch, 1, 1, 2] in pixels of each."""
        vision = config_of(module).vision_config
        side, reference = int(vision.image_size), reference_of(module)
        pixels = random_normal((batch, int(vision.num_channels), side, side), reference, generator)
        # Half precision would move points of large images from pixel to pixel.
        points = side * torch.rand((batch, 1, 1, 2), generator=generator, device=generator.device)
        return {"pixel_values": pixels, "input_points": points.to(reference.device)}

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count encoder, prompt encoder and decoder for one image and one point; see `sam_macs`."""
        return encoder_macs(config, shapes, attention_products=attention_products) + decoder_macs(
            config, attention_products=attention_products
        )

    def paper_macs(self, config: Mapping[str, Any], *, shapes: Shapes = AS_CONFIGURED) -> int:
        """Count linears and convolutions of the image encoder alone, as the table of SlimSAM nearly does."""
        return encoder_macs(config, shapes, attention_products=False)

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Encode positions of pixels and of points by one table."""
        return [(first, copy) for copy, first in implied_copies(config).items()]

    def native_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say one width and one inner width, where all layers have the same and heads share the width.

        The inner width is written out: left out, it would be `mlp_ratio` times the new width.
        """
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        vision = {
            **(config.get("vision_config") or {}),
            "hidden_size": sizes.shapes["vision_encoder.patch_embed.projection.weight"][0],
            "mlp_dim": sizes.shapes[f"{LAYERS}.0.mlp.lin1.weight"][0],
        }
        native = {**config, "vision_config": vision}
        return native if sizes.are_said_by(native, _attributes(native)) else None

    def _places(self, module: nn.Module) -> Iterator[tuple[str, Role, int | None]]:
        """Yield name, role and block of every linear that may be there, in forward order."""
        for index, (block, _) in enumerate(self.blocks(module)):
            yield from ((f"{block}.{ending}", role, index) for ending, role in _LAYER)
        for name, _ in module.get_submodule(f"{TWO_WAY}.layers").named_children():
            layer = f"{TWO_WAY}.layers.{name}"
            yield from _attention(f"{layer}.self_attn", _OWN)
            yield from _attention(f"{layer}.{TO_IMAGE}", _CROSS)
            yield from ((f"{layer}.{ending}", role, None) for ending, role in _LAYER[2:])
            yield from _attention(f"{layer}.{TO_TOKENS}", _CROSS)
        yield from _attention(FINAL_ATTENTION, _CROSS)
        networks = [name for name, _ in module.get_submodule(HYPERNETWORKS).named_children()]
        for network in (*(f"{HYPERNETWORKS}.{name}" for name in networks), RATING):
            layers = [name for name, _ in module.get_submodule(f"{network}.layers").named_children()]
            for ending in ("proj_in", *(f"layers.{name}" for name in layers), "proj_out"):
                yield f"{network}.{ending}", "head", None


def _attention(name: str, roles: tuple[Role, ...]) -> Iterator[tuple[str, Role, None]]:
    yield from ((f"{name}.{part}", role, None) for part, role in zip(PROJECTIONS, roles, strict=True))


def _attributes(config: Mapping[str, Any]) -> Attributes:
    """Return what the stock attentions of an encoder compute with."""
    encoder = sam_encoder(config)
    values = {"num_attention_heads": encoder.heads, "scale": encoder.head_dim**-0.5}
    return {f"{LAYERS}.{index}.attn": values for index in range(encoder.layers)}
