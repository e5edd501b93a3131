"""The tensors that the config of Flux's denoiser implies, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tensor_names import TIMESTEP_CHANNELS, Named, linear

_FEED_FORWARD = 4


def flux_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes.

    Args:
        config: completed by `complete_config`.
    """
    width = int(config["num_attention_heads"] * config["attention_head_dim"])
    channels = config["in_channels"]
    embedders = {"timestep_embedder": TIMESTEP_CHANNELS, "text_embedder": config["pooled_projection_dim"]}
    if config["guidance_embeds"]:
        embedders["guidance_embedder"] = TIMESTEP_CHANNELS
    for name, inputs in embedders.items():
        yield from linear(f"time_text_embed.{name}.linear_1", width, inputs)
        yield from linear(f"time_text_embed.{name}.linear_2", width, width)
    yield from linear("context_embedder", width, config["joint_attention_dim"])
    yield from linear("x_embedder", width, channels)
    for index in range(config["num_layers"]):
        yield from _double(f"transformer_blocks.{index}", width, config["attention_head_dim"])
    for index in range(config["num_single_layers"]):
        yield from _single(f"single_transformer_blocks.{index}", width, config["attention_head_dim"])
    yield from linear("norm_out.linear", 2 * width, width)
    yield from linear("proj_out", config["patch_size"] ** 2 * (config["out_channels"] or channels), width)


def _double(block: str, width: int, head_dim: int) -> Named:
    """Yield a block in which text and image have weights of their own."""
    for norm in ("norm1", "norm1_context"):
        yield from linear(f"{block}.{norm}.linear", 6 * width, width)
    for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield f"{block}.attn.{norm}.weight", (head_dim,)
    image = ("to_q", "to_k", "to_v", "to_out.0")
    for name in (*image, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        yield from linear(f"{block}.attn.{name}", width, width)
    for name in ("ff", "ff_context"):
        yield from linear(f"{block}.{name}.net.0.proj", _FEED_FORWARD * width, width)
        yield from linear(f"{block}.{name}.net.2", width, _FEED_FORWARD * width)


def _single(block: str, width: int, head_dim: int) -> Named:
    """Yield a block in which both are one sequence, and attention and feed-forward run side by side."""
    yield from linear(f"{block}.norm.linear", 3 * width, width)
    yield from linear(f"{block}.proj_mlp", _FEED_FORWARD * width, width)
    yield from linear(f"{block}.proj_out", width, (1 + _FEED_FORWARD) * width)
    for norm in ("norm_q", "norm_k"):
        yield f"{block}.attn.{norm}.weight", (head_dim,)
    for name in ("to_q", "to_k", "to_v"):
        yield from linear(f"{block}.attn.{name}", width, width)
