"""Hunyuan-DiT (arXiv 2405.08748): two texts, long skips from block to block, `HunyuanDiT2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import AS_CONFIGURED, FoldGroup, Shapes
from .hunyuan_shapes import WIDER, extra_width, inner_width, output_channels
from .shapes import TIMESTEP_CHANNELS
from .transformer import (
    TEXT_BLOCK_ROLES,
    DiffusionTransformer,
    RoleRule,
    config_of,
    feed_forward_macs,
    image_tokens,
    mlp_macs,
    patch_macs,
    product_macs,
    random_integers,
    random_normal,
    reference_of,
    stock_arguments,
    width_of,
)


class HunyuanFamily(DiffusionTransformer):
    """Adapter. The reference input is one latent image of the config's `sample_size` and both texts.

    The linears of the pooler, which makes one vector of the T5 text, are read and not called.
    """

    name = "hunyuan"
    class_names = ("HunyuanDiT2DModel",)
    block_lists = ("blocks",)
    attention_names = ("attn1", "attn2")
    before_blocks = ("time_extra_emb", "text_embedder")
    roles: ClassVar[tuple[RoleRule, ...]] = (
        (r"time_extra_emb\.timestep_embedder\.linear_1", "embedder"),
        (r"time_extra_emb\.timestep_embedder\.linear_2", "embedder"),
        (r"pooler\.q_proj", "embedder"),
        (r"pooler\.k_proj", "embedder"),
        (r"pooler\.v_proj", "embedder"),
        (r"pooler\.c_proj", "embedder"),
        (r"extra_embedder\.linear_1", "embedder"),
        (r"extra_embedder\.linear_2", "embedder"),
        (r"text_embedder\.linear_1", "embedder"),
        (r"text_embedder\.linear_2", "embedder"),
        (r"skip_linear", "projection"),
        (r"norm1\.linear", "adaln"),
        *TEXT_BLOCK_ROLES,
        (r"norm_out\.linear", "adaln"),
        (r"proj_out", "head"),
    )

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module, which here makes what its pipeline gives it."""
        from .hunyuan_module import HunyuanDiT2DModel

        module: nn.Module = HunyuanDiT2DModel(**stock_arguments(config))
        return module

    def adopt(self, module: nn.Module) -> nn.Module:
        """Let a stock module make what its pipeline gives it."""
        from .hunyuan_module import HunyuanDiT2DModel

        module.__class__ = HunyuanDiT2DModel
        return module

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold nothing: only quantizers move scales, and none is offered for this family."""
        return []

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random latents [batch, C, H, W], both texts with their masks, timesteps, places and sizes.

        Of every text the second half is padding.
        """
        from .hunyuan_module import rotations, sizes

        config, like = config_of(module), reference_of(module)
        side = config.sample_size
        inputs: dict[str, Any] = {
            "hidden_states": random_normal((batch, config.in_channels, side, side), like, generator),
            "timestep": random_integers(1000, batch, like, generator).to(like.dtype),
            "image_rotary_emb": rotations(config.attention_head_dim, side, config.patch_size, like),
        }
        texts = (
            ("", config.text_len, config.cross_attention_dim),
            ("_t5", config.text_len_t5, config.cross_attention_dim_t5),
        )
        for name, length, channels in texts:
            inputs[f"encoder_hidden_states{name}"] = random_normal((batch, length, channels), like, generator)
            mask = torch.arange(length, device=like.device) < max(1, length // 2)
            inputs[f"text_embedding_mask{name}"] = mask.long().repeat(batch, 1)
        if config.use_style_cond_and_image_meta_size:
            inputs["image_meta_size"] = sizes(side, batch).to(like)
            inputs["style"] = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return inputs

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward, both text embedders and the pooler included."""
        width, image = width_of(config), image_tokens(config)
        text, t5 = int(config["cross_attention_dim"]), int(config["cross_attention_dim_t5"])
        length = int(config["text_len_t5"])
        total = patch_macs(config) + 2 * width * width
        total += image * width * output_channels(config) * int(config["patch_size"]) ** 2
        total += mlp_macs(TIMESTEP_CHANNELS, width)
        # The pooler asks with the mean of the text, which also stands before it.
        total += t5 * (t5 * (1 + 2 * (length + 1)) + int(config["pooled_projection_dim"]))
        if attention_products:
            total += product_macs(1, length + 1, t5)
        total += WIDER * width * (extra_width(config) + width)
        total += length * WIDER * t5 * (t5 + text)
        layers = int(config["num_layers"])
        total += layers * _block_macs(config, attention_products)
        return total + (layers - 1 - layers // 2) * image * 2 * width * width  # after a skip

    def default_keep(self) -> tuple[str, ...]:
        """Embedders and head."""
        return ("time_extra_emb.*", "text_embedder.*", "proj_out")


def _block_macs(config: Mapping[str, Any], attention_products: bool) -> int:
    """MACs of one block without a skip: attention to the image, to both texts, feed-forward."""
    width, image = width_of(config), image_tokens(config)
    text = int(config["text_len"]) + int(config["text_len_t5"])
    gated = config["activation_fn"] == "geglu"
    total = width * width + 6 * image * width * width
    total += 2 * text * int(config["cross_attention_dim"]) * width
    total += feed_forward_macs(image, width, gated=gated, inner=inner_width(config))
    if attention_products:
        total += product_macs(image, image, width) + product_macs(image, text, width)
    return total
