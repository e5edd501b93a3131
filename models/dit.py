"""DiT (arXiv 2212.09748): class-conditional diffusion transformer, `DiTTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from .base import AS_CONFIGURED, FoldGroup, Shapes
from .blocks import EMBEDDER
from .diffusion_structure import attention_width, diffusion_structure, inner_width
from .shapes import TIMESTEP_CHANNELS
from .structure import PrunableStructure
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

_EMBEDDER_TENSORS = (
    "timestep_embedder.linear_1.weight",
    "timestep_embedder.linear_1.bias",
    "timestep_embedder.linear_2.weight",
    "timestep_embedder.linear_2.bias",
    "class_embedder.embedding_table.weight",
)


class DiTFamily(DiffusionTransformer):
    """Adapter. The reference input is one latent image of the config's `sample_size`."""

    name = "dit"
    class_names = ("DiTTransformer2DModel",)
    attention_names = ("attn1",)
    roles: ClassVar[tuple[RoleRule, ...]] = (
        (r"norm1\.emb\.timestep_embedder\.linear_1", "embedder"),
        (r"norm1\.emb\.timestep_embedder\.linear_2", "embedder"),
        (r"norm1\.linear", "adaln"),
        (r"attn1\.to_q", "attention.q"),
        (r"attn1\.to_k", "attention.k"),
        (r"attn1\.to_v", "attention.v"),
        (r"attn1\.to_out\.0", "attention.out"),
        (r"ff\.net\.0\.proj", "ff.in"),
        (r"ff\.net\.2", "ff.out"),
        (r"proj_out_1", "head"),
        (r"proj_out_2", "head"),
    )

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the adaptive norm (attention and feed-forward inputs) and into V (its output).

        The modulation's chunks are shift, scale, gate for attention, then for the feed-forward. The
        input of ff.net.2 comes from a GELU, which no scale passes.
        """
        groups = []
        for block, _ in self.blocks(module):
            qkv = [f"{block}.attn1.to_{letter}" for letter in "qkv"]
            groups += [
                fold_into_modulation(qkv, f"{block}.norm1.linear", shift_chunk=0, scale_chunk=1),
                fold_into_rows([f"{block}.attn1.to_out.0"], [f"{block}.attn1.to_v"]),
                fold_into_modulation([f"{block}.ff.net.0.proj"], f"{block}.norm1.linear", 3, 4),
            ]
        return groups

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random latents [batch, C, H, W], timesteps and labels [batch] int64."""
        config, like = config_of(module), reference_of(module)
        side = config.sample_size
        return {
            "hidden_states": random_normal((batch, config.in_channels, side, side), like, generator),
            "timestep": random_integers(1000, batch, like, generator),
            "class_labels": random_integers(config.num_embeds_ada_norm, batch, like, generator),
        }

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward; the embedder runs once per block and once for the head."""
        width, tokens = width_of(config), image_tokens(config)
        gated = config["activation_fn"] == "geglu"
        total = patch_macs(config) + unpatch_macs(config)
        total += mlp_macs(TIMESTEP_CHANNELS, width) + 2 * width * width
        for index in range(int(config["num_layers"])):
            name = f"transformer_blocks.{index}"
            heads = attention_width(shapes, f"{name}.attn1", width)
            total += 4 * tokens * width * heads
            if attention_products:
                total += product_macs(tokens, tokens, heads)
            inner = inner_width(shapes, f"{name}.ff", 4 * width)
            total += feed_forward_macs(tokens, width, gated=gated, inner=inner)
            total += 6 * width * width + mlp_macs(TIMESTEP_CHANNELS, width)
        return total

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Heads, their channels, and the inner channels of the feed-forward networks."""
        return diffusion_structure(self.blocks(module), self.attentions(module))

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Every block holds a copy of the one embedder; the head reads block 0's."""
        layers = range(int(config["num_layers"]))
        return [
            tuple(f"transformer_blocks.{index}.{EMBEDDER}.{tensor}" for index in layers)
            for tensor in _EMBEDDER_TENSORS
        ]

    def default_keep(self) -> tuple[str, ...]:
        """Embedders and head (the paper's t_embedder and final_layer)."""
        return (f"*.{EMBEDDER}.*", "proj_out_1", "proj_out_2")
