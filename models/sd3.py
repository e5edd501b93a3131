"""MMDiT of Stable Diffusion 3 (arXiv 2403.03206): `SD3Transformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import AS_CONFIGURED, FoldGroup, Shapes
from .shapes import TIMESTEP_CHANNELS
from .transformer import (
    DiffusionTransformer,
    RoleRule,
    config_of,
    feed_forward_macs,
    fold_into_modulation,
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

CONTEXT_TOKENS = 333  # 77 of the CLIP encoders and 256 of T5, the stock pipeline's defaults


class SD3Family(DiffusionTransformer):
    """Adapter. The reference input is one latent image and 333 text tokens.

    The projections of the text stream in the joint attention (`add_*`, `to_add_out`) have the cross.*
    roles: they carry the condition, as cross-attention does in other models.
    """

    name = "sd3"
    class_names = ("SD3Transformer2DModel",)
    attention_names = ("attn", "attn2")
    before_blocks = ("time_text_embed", "context_embedder")
    roles: ClassVar[tuple[RoleRule, ...]] = (
        (r"time_text_embed\.timestep_embedder\.linear_1", "embedder"),
        (r"time_text_embed\.timestep_embedder\.linear_2", "embedder"),
        (r"time_text_embed\.text_embedder\.linear_1", "embedder"),
        (r"time_text_embed\.text_embedder\.linear_2", "embedder"),
        (r"context_embedder", "embedder"),
        (r"norm1\.linear", "adaln"),
        (r"norm1_context\.linear", "adaln"),
        (r"attn\.to_q", "attention.q"),
        (r"attn\.to_k", "attention.k"),
        (r"attn\.to_v", "attention.v"),
        (r"attn\.add_q_proj", "cross.q"),
        (r"attn\.add_k_proj", "cross.k"),
        (r"attn\.add_v_proj", "cross.v"),
        (r"attn\.to_add_out", "cross.out"),
        (r"attn\.to_out\.0", "attention.out"),
        (r"attn2\.to_q", "attention.q"),
        (r"attn2\.to_k", "attention.k"),
        (r"attn2\.to_v", "attention.v"),
        (r"attn2\.to_out\.0", "attention.out"),
        (r"ff\.net\.0\.proj", "ff.in"),
        (r"ff\.net\.2", "ff.out"),
        (r"ff_context\.net\.0\.proj", "ff.in"),
        (r"ff_context\.net\.2", "ff.out"),
        (r"norm_out\.linear", "adaln"),
        (r"proj_out", "head"),
    )

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the adaptive norms of both streams and into the values.

        The joint attention mixes the values of both streams, so to_out.0 and to_add_out share one
        factor and both value projections absorb it. The last block's text norm computes (scale,
        shift) in this order and has no output projection.
        """
        groups = []
        for name, block in self.blocks(module):
            groups += _image_folds(name, block)
            groups += _text_folds(name, block)
        return groups

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random latents [batch, C, H, W], text states [batch, 333, C], pooled [batch, C], timesteps."""
        config, like = config_of(module), reference_of(module)
        side, text = config.sample_size, config.joint_attention_dim
        return {
            "hidden_states": random_normal((batch, config.in_channels, side, side), like, generator),
            "encoder_hidden_states": random_normal((batch, CONTEXT_TOKENS, text), like, generator),
            "pooled_projections": random_normal((batch, config.pooled_projection_dim), like, generator),
            "timestep": random_integers(1000, batch, like, generator),
        }

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward of both streams."""
        width, layers = width_of(config), int(config["num_layers"])
        total = patch_macs(config) + unpatch_macs(config) + 2 * width * width
        total += mlp_macs(TIMESTEP_CHANNELS, width) + mlp_macs(int(config["pooled_projection_dim"]), width)
        total += CONTEXT_TOKENS * int(config["joint_attention_dim"]) * width
        for index in range(layers):
            dual = index in config["dual_attention_layers"]
            total += _block_macs(width, image_tokens(config), dual, index == layers - 1, attention_products)
        return total

    def default_keep(self) -> tuple[str, ...]:
        """Embedders and head."""
        return ("time_text_embed.*", "context_embedder", "proj_out")


def _image_folds(name: str, block: nn.Module) -> list[FoldGroup]:
    norm = f"{name}.norm1.linear"
    groups = [
        fold_into_modulation([f"{name}.attn.to_{letter}" for letter in "qkv"], norm, 0, 1),
        fold_into_modulation([f"{name}.ff.net.0.proj"], norm, 3, 4),
    ]
    if block.attn2 is not None:
        groups += [
            fold_into_modulation([f"{name}.attn2.to_{letter}" for letter in "qkv"], norm, 6, 7),
            fold_into_rows([f"{name}.attn2.to_out.0"], [f"{name}.attn2.to_v"]),
        ]
    return groups


def _text_folds(name: str, block: nn.Module) -> list[FoldGroup]:
    norm, last = f"{name}.norm1_context.linear", block.context_pre_only
    projections = [f"{name}.attn.add_{letter}_proj" for letter in "qkv"]
    outputs = [f"{name}.attn.to_out.0"] + ([] if last else [f"{name}.attn.to_add_out"])
    groups = [
        fold_into_modulation(projections, norm, *((1, 0) if last else (0, 1))),
        fold_into_rows(outputs, [f"{name}.attn.to_v", f"{name}.attn.add_v_proj"]),
    ]
    if not last:
        groups.append(fold_into_modulation([f"{name}.ff_context.net.0.proj"], norm, 3, 4))
    return groups


def _block_macs(width: int, image: int, dual: bool, last: bool, attention_products: bool) -> int:
    square, text = width * width, CONTEXT_TOKENS
    modulation = (9 if dual else 6) + (2 if last else 6)
    total = modulation * square + 4 * image * square + (3 if last else 4) * text * square
    total += feed_forward_macs(image, width) + (0 if last else feed_forward_macs(text, width))
    total += 4 * image * square if dual else 0
    if attention_products:
        total += product_macs(image + text, image + text, width)
        total += product_macs(image, image, width) if dual else 0
    return total
