"""Flux (the report of its second version is arXiv 2506.15742): `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import AS_CONFIGURED, FoldGroup, Shapes
from .latent_sizes import latent_shape, tokens_of
from .shapes import TIMESTEP_CHANNELS
from .transformer import (
    DiffusionTransformer,
    RoleRule,
    config_of,
    feed_forward_macs,
    mlp_macs,
    product_macs,
    random_normal,
    reference_of,
    stock_arguments,
    width_of,
)

TEXT_TOKENS = 512
"""Of T5, the stock pipeline's default."""
_SINGLE = r"single_transformer_blocks\.\d+"
_GUIDANCE = 3.5


class FluxFamily(DiffusionTransformer):
    """Adapter. The reference input is one image of 1024 x 1024 pixels and 512 text tokens.

    In the first list of blocks text and image have weights of their own; the text's projections in the
    joint attention have the cross.* roles, as in SD3. In the second both are one sequence, and the output
    projections of attention and feed-forward are one matrix, which counts as `ff.out`.
    """

    name = "flux"
    class_names = ("FluxTransformer2DModel",)
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    attention_names = ("attn",)
    before_blocks = ("x_embedder", "time_text_embed", "context_embedder")
    roles: ClassVar[tuple[RoleRule, ...]] = (
        (r"x_embedder", "embedder"),
        (r"time_text_embed\.timestep_embedder\.linear_1", "embedder"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "embedder"),
        (r"time_text_embed\.guidance_embedder\.linear_1", "embedder"),
        (r"time_text_embed\.guidance_embedder\.linear_2", "embedder"),
        (r"time_text_embed\.text_embedder\.linear_1", "embedder"),
        (r"time_text_embed\.text_embedder\.linear_2", "embedder"),
        (r"context_embedder", "embedder"),
        (r"norm1\.linear", "adaln"),
        (r"norm1_context\.linear", "adaln"),
        (rf"{_SINGLE}\.norm\.linear", "adaln"),
        (rf"{_SINGLE}\.proj_mlp", "ff.in"),
        (r"attn\.to_q", "attention.q"),
        (r"attn\.to_k", "attention.k"),
        (r"attn\.to_v", "attention.v"),
        (r"attn\.add_q_proj", "cross.q"),
        (r"attn\.add_k_proj", "cross.k"),
        (r"attn\.add_v_proj", "cross.v"),
        (r"attn\.to_out\.0", "attention.out"),
        (r"attn\.to_add_out", "cross.out"),
        (r"ff\.net\.0\.proj", "ff.in"),
        (r"ff\.net\.2", "ff.out"),
        (r"ff_context\.net\.0\.proj", "ff.in"),
        (r"ff_context\.net\.2", "ff.out"),
        (rf"{_SINGLE}\.proj_out", "ff.out"),
        (r"norm_out\.linear", "adaln"),
        (r"proj_out", "head"),
    )

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module, which here takes images as well as tokens."""
        from .flux_module import FluxTransformer2DModel

        module: nn.Module = FluxTransformer2DModel(**stock_arguments(config))
        return module

    def adopt(self, module: nn.Module) -> nn.Module:
        """Let a stock module take images as well."""
        from .flux_module import FluxTransformer2DModel

        module.__class__ = FluxTransformer2DModel
        return module

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold nothing: only quantizers move scales, and none is offered for this family."""
        return []

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random tokens [batch, 4096, C], text [batch, 512, C], pooled [batch, C], times in [0, 1)."""
        from .flux_module import image_ids, text_ids

        config, like = config_of(module), reference_of(module)
        _, height, width = _reference(config)
        tokens = (height // 2) * (width // 2)
        pooled = (batch, config.pooled_projection_dim)
        inputs = {
            "hidden_states": random_normal((batch, tokens, config.in_channels), like, generator),
            "encoder_hidden_states": random_normal(
                (batch, TEXT_TOKENS, config.joint_attention_dim), like, generator
            ),
            "pooled_projections": random_normal(pooled, like, generator),
            "timestep": torch.rand(batch, generator=generator, device=generator.device).to(like),
            "img_ids": image_ids(height, width, like),
            "txt_ids": text_ids(TEXT_TOKENS, like),
        }
        if config.guidance_embeds:
            inputs["guidance"] = torch.full((batch,), _GUIDANCE, dtype=torch.float32, device=like.device)
        return inputs

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward of both streams."""
        width, image = width_of(config), tokens_of(config, _reference(config))
        embedders = 2 if config["guidance_embeds"] else 1
        total = embedders * mlp_macs(TIMESTEP_CHANNELS, width)
        total += mlp_macs(int(config["pooled_projection_dim"]), width)
        total += TEXT_TOKENS * int(config["joint_attention_dim"]) * width
        total += 2 * image * int(config["in_channels"]) * width + 2 * width * width
        together = image + TEXT_TOKENS
        products = product_macs(together, together, width) if attention_products else 0
        # The layers are the same for both streams and in both lists, but for the modulation.
        layers = 4 * together * width * width + feed_forward_macs(together, width)
        total += int(config["num_layers"]) * (12 * width * width + layers + products)
        total += int(config["num_single_layers"]) * (3 * width * width + layers + products)
        return total

    def default_keep(self) -> tuple[str, ...]:
        """Embedders and head."""
        return ("time_text_embed.*", "context_embedder", "x_embedder", "proj_out")


def _reference(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the shape of the reference image."""
    return latent_shape({**config, "_class_name": FluxFamily.class_names[0]})
