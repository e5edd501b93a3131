"""The tensors that the config of a Segment Anything model implies, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.sam_config import POSITIONS, POSITIONS_COPY
from ..runtime.sam_sizes import LAYER_DOWNSAMPLE_RATE, SamEncoder, part_of, sam_encoder
from .tensor_names import Named, affine, linear

ENCODER = "vision_encoder"
LAYERS = f"{ENCODER}.layers"
PROMPTS = "prompt_encoder"
DECODER = "mask_decoder"
TWO_WAY = f"{DECODER}.transformer"
HYPERNETWORKS = f"{DECODER}.output_hypernetworks_mlps"
RATING = f"{DECODER}.iou_prediction_head"
FINAL_ATTENTION = f"{TWO_WAY}.final_attn_token_to_image"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
TO_IMAGE, TO_TOKENS = "cross_attn_token_to_image", "cross_attn_image_to_token"


def sam_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes, with the copy of the positions.

    Args:
        config: completed by `complete_sam_config`.
    """
    features = part_of(config, "vision_config")["num_pos_feats"]
    yield POSITIONS, (2, features)
    yield from _encoder(sam_encoder(config))
    yield POSITIONS_COPY, (2, features)
    yield from _prompts(part_of(config, "prompt_encoder_config"))
    yield from _decoder(part_of(config, "mask_decoder_config"))


def _encoder(encoder: SamEncoder) -> Named:
    width, out = encoder.width, encoder.out_channels
    if encoder.absolute_positions:
        yield f"{ENCODER}.pos_embed", (1, encoder.side, encoder.side, width)
    projection = f"{ENCODER}.patch_embed.projection"
    yield f"{projection}.weight", (width, encoder.channels, encoder.patch, encoder.patch)
    yield f"{projection}.bias", (width,)
    for index in range(encoder.layers):
        yield from _layer(encoder, index)
    yield f"{ENCODER}.neck.conv1.weight", (out, width, 1, 1)
    yield from affine(f"{ENCODER}.neck.layer_norm1", out)
    yield f"{ENCODER}.neck.conv2.weight", (out, out, 3, 3)
    yield from affine(f"{ENCODER}.neck.layer_norm2", out)


def _layer(encoder: SamEncoder, index: int) -> Named:
    layer, width = f"{LAYERS}.{index}", encoder.width
    yield from affine(f"{layer}.layer_norm1", width)
    if encoder.relative_positions:
        side = encoder.side if encoder.is_global(index) else encoder.window
        for axis in "hw":
            yield f"{layer}.attn.rel_pos_{axis}", (2 * side - 1, encoder.head_dim)
    yield from linear(f"{layer}.attn.qkv", 3 * width, width, encoder.qkv_bias)
    yield from linear(f"{layer}.attn.proj", width, width)
    yield from affine(f"{layer}.layer_norm2", width)
    yield from linear(f"{layer}.mlp.lin1", encoder.inner, width)
    yield from linear(f"{layer}.mlp.lin2", width, encoder.inner)


def _prompts(prompt: Mapping[str, Any]) -> Named:
    width, masks = prompt["hidden_size"], prompt["mask_input_channels"]
    embed, first = f"{PROMPTS}.mask_embed", masks // 4
    convolutions = ((first, 1, 2, 2), (masks, first, 2, 2), (width, masks, 1, 1))
    for number, shape in enumerate(convolutions, start=1):
        yield f"{embed}.conv{number}.weight", shape
        yield f"{embed}.conv{number}.bias", shape[:1]
    yield from affine(f"{embed}.layer_norm1", first)
    yield from affine(f"{embed}.layer_norm2", first * 4)
    yield f"{PROMPTS}.no_mask_embed.weight", (1, width)
    for index in range(prompt["num_point_embeddings"]):
        yield f"{PROMPTS}.point_embed.{index}.weight", (1, width)
    yield f"{PROMPTS}.not_a_point_embed.weight", (1, width)


def _decoder(decoder: Mapping[str, Any]) -> Named:
    width, tokens = decoder["hidden_size"], decoder["num_multimask_outputs"] + 1
    inside = width // LAYER_DOWNSAMPLE_RATE
    yield f"{DECODER}.iou_token.weight", (1, width)
    yield f"{DECODER}.mask_tokens.weight", (tokens, width)
    for index in range(decoder["num_hidden_layers"]):
        layer = f"{TWO_WAY}.layers.{index}"
        yield from _attention(f"{layer}.self_attn", width, width)
        yield from _attention(f"{layer}.{TO_IMAGE}", width, inside)
        yield from linear(f"{layer}.mlp.lin1", decoder["mlp_dim"], width)
        yield from linear(f"{layer}.mlp.lin2", width, decoder["mlp_dim"])
        yield from _attention(f"{layer}.{TO_TOKENS}", width, inside)
        for norm in range(1, 5):
            yield from affine(f"{layer}.layer_norm{norm}", width)
    yield from _attention(FINAL_ATTENTION, width, width // decoder["attention_downsample_rate"])
    yield from affine(f"{TWO_WAY}.layer_norm_final_attn", width)
    for name, shape in (
        ("upscale_conv1", (width, width // 4, 2, 2)), ("upscale_conv2", (width // 4, width // 8, 2, 2))
    ):  # fmt: skip
        yield f"{DECODER}.{name}.weight", shape
        yield f"{DECODER}.{name}.bias", shape[1:2]
    yield from affine(f"{DECODER}.upscale_layer_norm", width // 4)
    for index in range(tokens):
        yield from _perceptron(f"{HYPERNETWORKS}.{index}", (width, width, width // 8), 3)
    sizes = (width, decoder["iou_head_hidden_dim"], tokens)
    yield from _perceptron(RATING, sizes, decoder["iou_head_depth"])


def _attention(name: str, width: int, inside: int) -> Named:
    for projection in PROJECTIONS[:3]:
        yield from linear(f"{name}.{projection}", inside, width)
    yield from linear(f"{name}.{PROJECTIONS[3]}", width, inside)


def _perceptron(name: str, sizes: tuple[int, int, int], depth: int) -> Named:
    """Yield the linears of one with (inputs, hidden, outputs) and as many layers, two at least."""
    inputs, hidden, outputs = sizes
    yield from linear(f"{name}.proj_in", hidden, inputs)
    yield from linear(f"{name}.proj_out", outputs, hidden)
    for index in range(depth - 2):
        yield from linear(f"{name}.layers.{index}", hidden, hidden)
