"""Counting the work of a Segment Anything model. Torch-free.

Linears and convolutions count by their weights, each as often as it is applied: in layers with windows, the
projections of attentions also work on the tokens that fill the image up to whole windows (4,900 instead of
4,096 at 1,024 pixels). Attention products are Q K^T and the weighted sum of V. Left out are biases, norms,
activations, softmax, and the products of queries with the tables of relative positions (`position_macs`),
which are about a hundredth of the encoder's work.

The table of SlimSAM (arXiv 2312.05284) leaves attention products out. Its 372, 98 and 23 G of SAM-B and two
slimmed models are 368.7, 94.8 and 20.9 G of `encoder_macs` without products and 1.8 G of the decoder; the
paper does not say what the other 0.3 to 1.5 G are.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..runtime.sam_sizes import SamEncoder, part_of, sam_encoder
from .sam_shapes import (
    DECODER,
    ENCODER,
    FINAL_ATTENTION,
    HYPERNETWORKS,
    LAYERS,
    RATING,
    TO_IMAGE,
    TO_TOKENS,
    TWO_WAY,
    sam_tensors,
)

Shapes = Mapping[str, tuple[int, ...]]


def sizes_of(config: Mapping[str, Any], shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors.

    Args:
        config: completed.
        shapes: of those that differ from what the config implies.
    """
    return {**dict(sam_tensors(config)), **shapes}


def encoder_parameters(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Count the parameters of the image encoder.

    Args:
        config: completed.
        shapes: of those tensors that differ from what the config implies.
    """
    sizes = sizes_of(config, shapes)
    return sum(prod(shape) for name, shape in sizes.items() if name.startswith(f"{ENCODER}."))


def encoder_macs(config: Mapping[str, Any], shapes: Shapes, *, attention_products: bool = True) -> int:
    """Count the image encoder for one image.

    Args:
        config: completed.
        shapes: of those tensors that differ from what the config implies.
        attention_products: count Q K^T and the weighted sums of V.
    """
    encoder, sizes = sam_encoder(config), sizes_of(config, shapes)
    tokens = encoder.side**2
    ends = ("patch_embed.projection", "neck.conv1", "neck.conv2")
    count = tokens * sum(prod(sizes[f"{ENCODER}.{name}.weight"]) for name in ends)
    for index in range(encoder.layers):
        layer = f"{LAYERS}.{index}"
        windows, keys = _windows(encoder, index)
        queries = windows * keys
        qkv, proj = sizes[f"{layer}.attn.qkv.weight"], sizes[f"{layer}.attn.proj.weight"]
        count += queries * (prod(qkv) + prod(proj))
        count += tokens * sum(prod(sizes[f"{layer}.mlp.{name}.weight"]) for name in ("lin1", "lin2"))
        if attention_products:
            count += 2 * queries * keys * (qkv[0] // 3)
    return count


def position_macs(config: Mapping[str, Any], shapes: Shapes) -> int:
    """Count the products of queries with the tables of relative positions, which `encoder_macs` leaves out.

    Args:
        config: completed.
        shapes: of those tensors that differ from what the config implies.
    """
    encoder, sizes = sam_encoder(config), sizes_of(config, shapes)
    count = 0
    for index in range(encoder.layers if encoder.relative_positions else 0):
        windows, keys = _windows(encoder, index)
        side = encoder.side if encoder.is_global(index) else encoder.window
        count += 2 * windows * keys * side * (sizes[f"{LAYERS}.{index}.attn.qkv.weight"][0] // 3)
    return count


def decoder_macs(config: Mapping[str, Any], *, points: int = 1, attention_products: bool = True) -> int:
    """Count prompt encoder and mask decoder.

    Args:
        config: completed.
        points: how many prompts of one point each one image gets; no mask is among them.
        attention_products: count Q K^T and the weighted sums of V.
    """
    features = part_of(config, "vision_config")["num_pos_feats"]
    pixels = sam_encoder(config).side ** 2
    positions = (
        2 * features * pixels + points * 2 * features * 2
    )  # of every token, of a point and its end mark
    return positions + points * _prompt_macs(config, pixels, attention_products)


def _prompt_macs(config: Mapping[str, Any], pixels: int, attention_products: bool) -> int:
    """Count the decoder for one prompt; `pixels` are the tokens of an image."""
    sizes, decoder = dict(sam_tensors(config)), part_of(config, "mask_decoder_config")
    masks = decoder["num_multimask_outputs"] + 1
    tokens = 1 + masks + 2  # the rating, the masks, the point and its end mark
    count = 0
    attentions = [(FINAL_ATTENTION, tokens, pixels)]
    for index in range(decoder["num_hidden_layers"]):
        layer = f"{TWO_WAY}.layers.{index}"
        attentions += [
            (f"{layer}.self_attn", tokens, tokens),
            (f"{layer}.{TO_IMAGE}", tokens, pixels),
            (f"{layer}.{TO_TOKENS}", pixels, tokens),
        ]
        count += tokens * sum(prod(sizes[f"{layer}.mlp.{name}.weight"]) for name in ("lin1", "lin2"))
    for name, queries, keys in attentions:
        weight = prod(sizes[f"{name}.q_proj.weight"])
        count += 2 * (queries + keys) * weight
        if attention_products:
            count += 2 * queries * keys * sizes[f"{name}.q_proj.weight"][0]
    count += sum(
        prod(shape)
        for name, shape in sizes.items()
        if name.startswith((f"{HYPERNETWORKS}.", f"{RATING}.")) and len(shape) == 2
    )
    first, second = (sizes[f"{DECODER}.upscale_conv{number}.weight"] for number in (1, 2))
    return count + pixels * prod(first) + 4 * pixels * prod(second) + 16 * pixels * masks * second[1]


def _windows(encoder: SamEncoder, layer: int) -> tuple[int, int]:
    """Return how many windows a layer has, and the tokens of each."""
    if encoder.is_global(layer):
        return 1, encoder.side**2
    return (encoder.padded_side // encoder.window) ** 2, encoder.window**2
