"""The tensors that the config of an image classifier implies, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.vision_sizes import ConvNextShape, Images, convnext_shape, swin_shape, vit_shape
from .tensor_names import Named, affine, linear


def vit_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes of a ViT or DeiT.

    Args:
        config: completed by `complete_vision_config`.
    """
    shape = vit_shape(config)
    root, width = shape.root, shape.width
    yield f"{root}.embeddings.cls_token", (1, 1, width)
    yield f"{root}.embeddings.position_embeddings", (1, shape.tokens, width)
    if shape.special_tokens == 2:
        yield f"{root}.embeddings.distillation_token", (1, 1, width)
    yield from _patches(f"{root}.embeddings.patch_embeddings.projection", shape.images, width)
    for index in range(shape.layers):
        layer = f"{root}.layers.{index}"
        inside = shape.heads * shape.head_dim
        yield from _attention(f"{layer}.attention", width, inside, shape.qkv_bias)
        yield from affine(f"{layer}.layernorm_before", width)
        yield from affine(f"{layer}.layernorm_after", width)
        yield from _mlp(f"{layer}.mlp", width, shape.inner)
    yield from affine(f"{root}.layernorm", width)
    for name in shape.classifiers:
        yield from linear(name, shape.images.labels, width)


def convnext_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes of a ConvNeXt.

    Args:
        config: completed by `complete_vision_config`.
    """
    shape = convnext_shape(config)
    yield from _patches("convnext.embeddings.patch_embeddings", shape.images, shape.widths[0])
    yield from affine("convnext.embeddings.layernorm", shape.widths[0])
    for stage, (width, depth) in enumerate(zip(shape.widths, shape.depths, strict=True)):
        name = f"convnext.encoder.stages.{stage}"
        if stage:
            before = shape.widths[stage - 1]
            yield from affine(f"{name}.downsampling_layer.0", before)
            yield f"{name}.downsampling_layer.1.weight", (width, before, 2, 2)
            yield f"{name}.downsampling_layer.1.bias", (width,)
        for index in range(depth):
            yield from _convnext_block(f"{name}.layers.{index}", width, shape)
    yield from affine("convnext.layernorm", shape.widths[-1])
    yield from linear("classifier", shape.images.labels, shape.widths[-1])


def swin_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes of a Swin Transformer.

    Args:
        config: completed by `complete_vision_config`.
    """
    shape = swin_shape(config)
    width = shape.widths[0]
    if shape.positions:
        yield "swin.embeddings.position_embeddings", (1, shape.images.grid[0] * shape.images.grid[1], width)
    yield from _patches("swin.embeddings.patch_embeddings.projection", shape.images, width)
    yield from affine("swin.embeddings.norm", width)
    for stage, width in enumerate(shape.widths):
        name = f"swin.encoder.layers.{stage}"
        for index in range(shape.depths[stage]):
            block = f"{name}.blocks.{index}"
            yield from _attention(f"{block}.attention", width, width, shape.qkv_bias)
            table = f"{block}.attention.relative_position_bias.relative_position_bias_table"
            yield table, ((2 * shape.window - 1) ** 2, shape.heads[stage])
            yield from affine(f"{block}.layernorm_before", width)
            yield from affine(f"{block}.layernorm_after", width)
            yield from _mlp(f"{block}.mlp", width, shape.inner[stage])
        if stage < len(shape.widths) - 1:
            yield from linear(f"{name}.downsample.reduction", 2 * width, 4 * width, bias=False)
            yield from affine(f"{name}.downsample.norm", 4 * width)
    yield from affine("swin.layernorm", shape.widths[-1])
    yield from linear("classifier", shape.images.labels, shape.widths[-1])


def _convnext_block(name: str, width: int, shape: ConvNextShape) -> Named:
    if shape.layer_scale:
        yield f"{name}.layer_scale_parameter", (width,)
    yield f"{name}.dwconv.weight", (width, 1, 7, 7)
    yield f"{name}.dwconv.bias", (width,)
    yield from affine(f"{name}.layernorm", width)
    yield from linear(f"{name}.pwconv1", 4 * width, width)
    yield from linear(f"{name}.pwconv2", width, 4 * width)


def _patches(name: str, images: Images, width: int) -> Named:
    yield f"{name}.weight", (width, images.channels, *images.patch)
    yield f"{name}.bias", (width,)


def _attention(name: str, width: int, inside: int, qkv_bias: bool) -> Named:
    for letter in "qkv":
        yield from linear(f"{name}.{letter}_proj", inside, width, qkv_bias)
    yield from linear(f"{name}.o_proj", width, inside)


def _mlp(name: str, width: int, inner: int) -> Named:
    yield from linear(f"{name}.fc1", inner, width)
    yield from linear(f"{name}.fc2", width, inner)
