"""PixArt (arXiv 2310.00426, 2403.04692): text-conditional, `PixArtTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import AS_CONFIGURED, FoldGroup, Shapes
from .diffusion_structure import attention_width, diffusion_structure, inner_width
from .shapes import TIMESTEP_CHANNELS, uses_additional_conditions
from .structure import PrunableStructure
from .transformer import (
    TEXT_BLOCK_ROLES,
    DiffusionTransformer,
    RoleRule,
    config_of,
    feed_forward_macs,
    fold_into_rows,
    image_tokens,
    mlp_macs,
    patch_macs,
    product_macs,
    random_integers,
    random_normal,
    reference_of,
    unpatch_macs,
    width_of,
)

CAPTION_TOKENS = 120


class PixArtFamily(DiffusionTransformer):
    """Adapter. The reference input is one latent image and a caption of 120 tokens."""

    name = "pixart"
    class_names = ("PixArtTransformer2DModel",)
    attention_names = ("attn1", "attn2")
    before_blocks = ("adaln_single", "caption_projection")
    roles: ClassVar[tuple[RoleRule, ...]] = (
        (r"emb\.timestep_embedder\.linear_1", "embedder"),
        (r"emb\.timestep_embedder\.linear_2", "embedder"),
        (r"emb\.resolution_embedder\.linear_1", "embedder"),
        (r"emb\.resolution_embedder\.linear_2", "embedder"),
        (r"emb\.aspect_ratio_embedder\.linear_1", "embedder"),
        (r"emb\.aspect_ratio_embedder\.linear_2", "embedder"),
        (r"adaln_single\.linear", "adaln"),
        (r"caption_projection\.linear_1", "embedder"),
        (r"caption_projection\.linear_2", "embedder"),
        *TEXT_BLOCK_ROLES,
        (r"proj_out", "head"),
    )

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into V only.

        A block modulates by its own scale_shift_table plus one projection that all blocks share, so a
        factor of one block cannot be absorbed by either of them.
        """
        return [fold_into_rows([f"{name}.to_out.0"], [f"{name}.to_v"]) for name, _ in self.attentions(module)]

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random latents [batch, C, H, W], caption states [batch, 120, channels], timesteps [batch]."""
        config, like = config_of(module), reference_of(module)
        side = config.sample_size
        channels = config.caption_channels or config.cross_attention_dim or width_of(config)
        inputs: dict[str, Any] = {
            "hidden_states": random_normal((batch, config.in_channels, side, side), like, generator),
            "encoder_hidden_states": random_normal((batch, CAPTION_TOKENS, channels), like, generator),
            "encoder_attention_mask": torch.ones(batch, CAPTION_TOKENS, dtype=like.dtype, device=like.device),
            "timestep": random_integers(1000, batch, like, generator),
        }
        if uses_additional_conditions(config):
            inputs["added_cond_kwargs"] = size_conditions(side * 8, batch, like)
        return inputs

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward, caption projection and size embedders included."""
        width = width_of(config)
        total = patch_macs(config) + unpatch_macs(config)
        for index in range(int(config["num_layers"])):
            total += _block_macs(config, f"transformer_blocks.{index}", attention_products, shapes)
        total += mlp_macs(TIMESTEP_CHANNELS, width) + 6 * width * width
        if uses_additional_conditions(config):
            total += 3 * mlp_macs(TIMESTEP_CHANNELS, width // 3)  # height, width and aspect ratio
        if config["caption_channels"] is not None:
            total += CAPTION_TOKENS * mlp_macs(int(config["caption_channels"]), width)
        return total

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Heads of both attentions, their channels, and the inner channels of the feed-forward networks."""
        return diffusion_structure(self.blocks(module), self.attentions(module))

    def default_keep(self) -> tuple[str, ...]:
        """Embedders, caption projection and head."""
        return ("adaln_single.emb.*", "caption_projection.*", "proj_out")


def _block_macs(config: Mapping[str, Any], name: str, attention_products: bool, shapes: Shapes) -> int:
    """MACs of one block: attention to the image, to the caption, feed-forward."""
    width, tokens = width_of(config), image_tokens(config)
    heads = attention_width(shapes, f"{name}.attn1", width)
    inner = inner_width(shapes, f"{name}.ff", 4 * width)
    macs = 4 * tokens * width * heads
    macs += feed_forward_macs(tokens, width, gated=config["activation_fn"] == "geglu", inner=inner)
    if attention_products:
        macs += product_macs(tokens, tokens, heads)
    if config["cross_attention_dim"] is not None:
        source = int(config["cross_attention_dim"])
        heads = attention_width(shapes, f"{name}.attn2", width)
        macs += 2 * tokens * width * heads + 2 * CAPTION_TOKENS * source * heads
        if attention_products:
            macs += product_macs(tokens, CAPTION_TOKENS, heads)
    return macs


def size_conditions(pixels: int, batch: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return PixArt-alpha's conditions for square images.

    Args:
        pixels: side of the image.
        batch: images.
        like: gives dtype and device.

    Returns:
        resolution [batch, 2] and aspect_ratio [batch, 1].
    """
    resolution = torch.full((batch, 2), float(pixels), dtype=like.dtype, device=like.device)
    aspect_ratio = torch.ones(batch, 1, dtype=like.dtype, device=like.device)
    return {"resolution": resolution, "aspect_ratio": aspect_ratio}
