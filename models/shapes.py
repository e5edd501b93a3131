"""The tensors that a config implies, without importing torch.

Importing diffusers takes seconds; a checkpoint whose shapes do not fit its config must be refused in
less. So the constructors' arithmetic stands here once more, and a test holds it against the stock
classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..runtime.config import DEFAULTS, complete_config, model_width
from ..runtime.language_config import LANGUAGE_CLASSES
from ..runtime.mapped_routing import MAPPING
from ..runtime.moe_classes import MOE_CLASSES
from ..runtime.sam_sizes import SAM_CLASSES
from ..runtime.vision_sizes import VISION_CLASSES, VISION_KINDS
from .flux_shapes import flux_tensors
from .hunyuan_shapes import hunyuan_tensors
from .llm_shapes import language_tensors
from .moe_shapes import CORRECTION, moe_tensors
from .sam_shapes import sam_tensors
from .tensor_names import TIMESTEP_CHANNELS, Named, Shape, affine, linear
from .unet_shapes import unet_tensors
from .vision_shapes import convnext_tensors, swin_tensors, vit_tensors

__all__ = [
    "DEFAULTS",
    "PERSISTENT_BUFFERS",
    "TIMESTEP_CHANNELS",
    "complete_config",
    "expected_shapes",
    "is_stored_buffer",
    "stays_in_float32",
    "uses_additional_conditions",
]


PERSISTENT_BUFFERS: Mapping[str, frozenset[str]] = {
    "SD3Transformer2DModel": frozenset({"pos_embed.pos_embed"}),
}


def expected_shapes(class_name: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the state dict's names and shapes, persistent buffers included.

    Args:
        class_name: a supported stock class.
        config: completed by `complete_config`.
    """
    return dict(_BUILDERS[class_name](config))


def is_stored_buffer(class_name: str, name: str) -> bool:
    """Tell whether a tensor of the state dict is fixed, and no parameter."""
    return name in PERSISTENT_BUFFERS.get(class_name, frozenset()) or name.endswith(CORRECTION)


def stays_in_float32(name: str) -> bool:
    """Tell whether a tensor of the state dict is kept in float32, whatever the model's dtype."""
    return name.endswith((CORRECTION, f".{MAPPING}"))


def uses_additional_conditions(config: Mapping[str, Any]) -> bool:
    """Tell whether a PixArt model takes resolution and aspect ratio (the stock class's rule)."""
    given = config["use_additional_conditions"]
    return bool(config["sample_size"] == 128 if given is None else given)


def _mlp(name: str, width: int, in_features: int) -> Named:
    yield from linear(f"{name}.linear_1", width, in_features)
    yield from linear(f"{name}.linear_2", width, width)


def _patches(config: Mapping[str, Any], width: int) -> Named:
    patch = config["patch_size"]
    yield "pos_embed.proj.weight", (width, config["in_channels"], patch, patch)
    yield "pos_embed.proj.bias", (width,)


def _pixels(config: Mapping[str, Any]) -> int:
    out_channels = config["out_channels"] or config["in_channels"]
    return int(config["patch_size"] ** 2 * out_channels)


def _attention(name: str, width: int, source_width: int, bias: bool) -> Named:
    yield from linear(f"{name}.to_q", width, width, bias)
    yield from linear(f"{name}.to_k", width, source_width, bias)
    yield from linear(f"{name}.to_v", width, source_width, bias)
    yield from linear(f"{name}.to_out.0", width, width)


def _feed_forward(name: str, width: int, gated: bool = False) -> Named:
    yield from linear(f"{name}.net.0.proj", width * (8 if gated else 4), width)
    yield from linear(f"{name}.net.2", width, width * 4)


def _dit(config: Mapping[str, Any]) -> Named:
    width = model_width(config)
    yield from _patches(config, width)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        yield from _mlp(f"{block}.norm1.emb.timestep_embedder", width, TIMESTEP_CHANNELS)
        classes = config["num_embeds_ada_norm"] + 1  # the last one is the null class of guidance
        yield f"{block}.norm1.emb.class_embedder.embedding_table.weight", (classes, width)
        yield from linear(f"{block}.norm1.linear", 6 * width, width)
        yield from _attention(f"{block}.attn1", width, width, config["attention_bias"])
        yield from affine(f"{block}.norm3", width, config["norm_elementwise_affine"])
        yield from _feed_forward(f"{block}.ff", width, config["activation_fn"] == "geglu")
    yield from linear("proj_out_1", 2 * width, width)
    yield from linear("proj_out_2", _pixels(config), width)


def _pixart(config: Mapping[str, Any]) -> Named:
    width, bias = model_width(config), config["attention_bias"]
    yield "scale_shift_table", (2, width)
    yield from _patches(config, width)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        yield f"{block}.scale_shift_table", (6, width)
        yield from affine(f"{block}.norm1", width, config["norm_elementwise_affine"])
        yield from _attention(f"{block}.attn1", width, width, bias)
        yield from affine(f"{block}.norm2", width, config["norm_elementwise_affine"])
        if config["cross_attention_dim"] is not None:
            yield from _attention(f"{block}.attn2", width, config["cross_attention_dim"], bias)
        yield from _feed_forward(f"{block}.ff", width, config["activation_fn"] == "geglu")
    yield from linear("proj_out", _pixels(config), width)
    yield from _mlp("adaln_single.emb.timestep_embedder", width, TIMESTEP_CHANNELS)
    if uses_additional_conditions(config):
        for name in ("resolution_embedder", "aspect_ratio_embedder"):
            yield from _mlp(f"adaln_single.emb.{name}", width // 3, TIMESTEP_CHANNELS)
    yield from linear("adaln_single.linear", 6 * width, width)
    if config["caption_channels"] is not None:
        yield from _mlp("caption_projection", width, config["caption_channels"])


def _sd3(config: Mapping[str, Any]) -> Named:
    width = model_width(config)
    yield "pos_embed.pos_embed", (1, config["pos_embed_max_size"] ** 2, width)
    yield from _patches(config, width)
    yield from _mlp("time_text_embed.timestep_embedder", width, TIMESTEP_CHANNELS)
    yield from _mlp("time_text_embed.text_embedder", width, config["pooled_projection_dim"])
    yield from linear("context_embedder", config["caption_projection_dim"], config["joint_attention_dim"])
    for index in range(config["num_layers"]):
        yield from _sd3_block(config, index, width)
    yield from linear("norm_out.linear", 2 * width, width)
    yield from linear("proj_out", _pixels(config), width)


def _sd3_block(config: Mapping[str, Any], index: int, width: int) -> Named:
    block, last = f"transformer_blocks.{index}", index == config["num_layers"] - 1
    dual = index in config["dual_attention_layers"]
    yield from linear(f"{block}.norm1.linear", (9 if dual else 6) * width, width)
    yield from linear(f"{block}.norm1_context.linear", (2 if last else 6) * width, width)
    norms = ("norm_q", "norm_k") if config["qk_norm"] else ()
    head_dim = config["attention_head_dim"]
    for name in (*norms, *(("norm_added_q", "norm_added_k") if norms else ())):
        yield f"{block}.attn.{name}.weight", (head_dim,)
    yield from _attention(f"{block}.attn", width, width, True)
    for name in ("add_k_proj", "add_v_proj", "add_q_proj") + (() if last else ("to_add_out",)):
        yield from linear(f"{block}.attn.{name}", width, width)
    if dual:
        for name in norms:
            yield f"{block}.attn2.{name}.weight", (head_dim,)
        yield from _attention(f"{block}.attn2", width, width, True)
    yield from _feed_forward(f"{block}.ff", width)
    if not last:
        yield from _feed_forward(f"{block}.ff_context", width)


_VISION: Mapping[str, Callable[[Mapping[str, Any]], Named]] = {
    "vit": vit_tensors,
    "convnext": convnext_tensors,
    "swin": swin_tensors,
}
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any]], Named]] = {
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": flux_tensors,
    "HunyuanDiT2DModel": hunyuan_tensors,
    "UNet2DConditionModel": unet_tensors,
    **dict.fromkeys(LANGUAGE_CLASSES, language_tensors),
    **dict.fromkeys(MOE_CLASSES, moe_tensors),
    **{name: _VISION[VISION_KINDS[model_type]] for name, (model_type, _) in VISION_CLASSES.items()},
    **dict.fromkeys(SAM_CLASSES, sam_tensors),
}
