"""The tensors that the config of Hunyuan-DiT implies, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tensor_names import TIMESTEP_CHANNELS, Named, affine, linear

_SIZES = 6
"""Numbers that tell the size of an image: of the original, of the crop, and where that lies."""
WIDER = 4
"""How much wider the two text embedders are inside."""


def inner_width(config: Mapping[str, Any]) -> int:
    """Return the channels inside a feed-forward network."""
    return int(config["hidden_size"] * config["mlp_ratio"])


def extra_width(config: Mapping[str, Any]) -> int:
    """Return the channels of what is told beside the text: its pooled form, sizes and style."""
    found = int(config["pooled_projection_dim"])
    if config["use_style_cond_and_image_meta_size"]:
        found += _SIZES * TIMESTEP_CHANNELS + int(config["hidden_size"])
    return found


def output_channels(config: Mapping[str, Any]) -> int:
    """Return the channels of what the model predicts, its variance included."""
    return int(config["in_channels"]) * (2 if config["learn_sigma"] else 1)


def hunyuan_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes.

    Args:
        config: completed by `complete_config`.
    """
    width, patch = int(config["hidden_size"]), int(config["patch_size"])
    text, t5 = int(config["cross_attention_dim"]), int(config["cross_attention_dim_t5"])
    yield "text_embedding_padding", (config["text_len"] + config["text_len_t5"], text)
    yield from linear("text_embedder.linear_1", WIDER * t5, t5)
    yield from linear("text_embedder.linear_2", text, WIDER * t5)
    yield "pos_embed.proj.weight", (width, config["in_channels"], patch, patch)
    yield "pos_embed.proj.bias", (width,)
    yield from _conditions(config, "time_extra_emb", width, t5)
    layers = int(config["num_layers"])
    for index in range(layers):
        yield from _block(config, f"blocks.{index}", skip=index > layers // 2)
    yield from linear("norm_out.linear", 2 * width, width)
    yield from linear("proj_out", patch**2 * output_channels(config), width)


def _conditions(config: Mapping[str, Any], name: str, width: int, t5: int) -> Named:
    yield from linear(f"{name}.timestep_embedder.linear_1", width, TIMESTEP_CHANNELS)
    yield from linear(f"{name}.timestep_embedder.linear_2", width, width)
    yield f"{name}.pooler.positional_embedding", (config["text_len_t5"] + 1, t5)
    for letter in "kqv":
        yield from linear(f"{name}.pooler.{letter}_proj", t5, t5)
    yield from linear(f"{name}.pooler.c_proj", config["pooled_projection_dim"], t5)
    if config["use_style_cond_and_image_meta_size"]:
        yield f"{name}.style_embedder.weight", (1, width)
    yield from linear(f"{name}.extra_embedder.linear_1", WIDER * width, extra_width(config))
    yield from linear(f"{name}.extra_embedder.linear_2", width, WIDER * width)


def _block(config: Mapping[str, Any], block: str, *, skip: bool) -> Named:
    width, inner = int(config["hidden_size"]), inner_width(config)
    gated = config["activation_fn"] == "geglu"
    yield from linear(f"{block}.norm1.linear", width, width)
    yield from affine(f"{block}.norm1.norm", width)
    for name, source in (("attn1", width), ("attn2", int(config["cross_attention_dim"]))):
        for norm in ("norm_q", "norm_k"):
            yield from affine(f"{block}.{name}.{norm}", int(config["attention_head_dim"]))
        yield from linear(f"{block}.{name}.to_q", width, width)
        yield from linear(f"{block}.{name}.to_k", width, source)
        yield from linear(f"{block}.{name}.to_v", width, source)
        yield from linear(f"{block}.{name}.to_out.0", width, width)
    yield from affine(f"{block}.norm2", width)
    yield from affine(f"{block}.norm3", width)
    yield from linear(f"{block}.ff.net.0.proj", inner * (2 if gated else 1), width)
    yield from linear(f"{block}.ff.net.2", width, inner)
    if skip:
        yield from affine(f"{block}.skip_norm", 2 * width)
        yield from linear(f"{block}.skip_linear", width, 2 * width)
