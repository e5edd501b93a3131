"""The layers of a `UNet2DConditionModel`, from its config alone. Torch-free.

What stands here once serves the expected shapes and the count of work. Tests hold it against the stock
class on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..runtime.config_unet import per_stage, transformer_layers

TEXT_TOKENS = 77
"""Tokens of the text at the reference input: what CLIP's tokenizer pads to."""

Reads = Literal["image", "text", "vector"]


@dataclass(frozen=True)
class Layer:
    """A linear, a convolution, or a norm with its affine weights.

    Attributes:
        name: dotted, in the stock class.
        weight: shape of the weight; one number for a norm.
        bias: whether there is one, as long as the weight's first side.
        reads: what it runs over: positions of the image, tokens of the text, or one vector a sample.
        level: how often the image that it makes has been halved.
    """

    name: str
    weight: tuple[int, ...]
    bias: bool = True
    reads: Reads = "image"
    level: int = 0


@dataclass(frozen=True)
class Unit:
    """One step of a stage.

    Attributes:
        name: dotted, in the stock class.
        kind: what it is; `resize` is the convolution after halving or doubling.
        inputs, outputs: channels.
        level: how often the image that it makes has been halved.
        blocks: transformer blocks, of an attention.
    """

    name: str
    kind: Literal["resnet", "attention", "resize"]
    inputs: int
    outputs: int
    level: int
    blocks: int = 0


def unet_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the state dict.

    Args:
        config: completed by `complete_config`.
    """
    for layer in layers(config):
        yield f"{layer.name}.weight", layer.weight
        if layer.bias:
            yield f"{layer.name}.bias", layer.weight[:1]


def layers(config: Mapping[str, Any]) -> Iterator[Layer]:
    """Yield all layers with weights, those of a unit together, units in the order of a forward."""
    first, time = config["block_out_channels"][0], time_width(config)
    yield from _mlp("time_embedding", first, time)
    if config["addition_embed_type"] is not None:
        yield from _mlp("add_embedding", config["projection_class_embeddings_input_dim"], time)
    yield _conv("conv_in", first, config["in_channels"], config["conv_in_kernel"], 0)
    for unit in units(config):
        yield from _unit_layers(config, unit, time)
    yield Layer("conv_norm_out", (first,))
    yield _conv("conv_out", config["out_channels"], first, config["conv_out_kernel"], 0)


def units(config: Mapping[str, Any]) -> Iterator[Unit]:
    """Yield the residual networks, attentions and resizings in the order of a forward."""
    down, middle, up = transformer_layers(config)
    widths, counts = list(config["block_out_channels"]), per_stage(config, "layers_per_block")
    last = len(widths) - 1
    skips = [widths[0]]  # channels of what the way up reads again, in the order in which it is made
    for index, width in enumerate(widths):
        name, attends = f"down_blocks.{index}", config["down_block_types"][index].startswith("CrossAttn")
        inputs = widths[max(index - 1, 0)]
        for place in range(counts[index]):
            yield from _pair(name, place, inputs if place == 0 else width, width, index,
                             down[index][place] if attends else 0)  # fmt: skip
            skips.append(width)
        if index < last:
            yield Unit(f"{name}.downsamplers.0.conv", "resize", width, width, index + 1)
            skips.append(width)
    if config["mid_block_type"] is not None:
        yield from _pair("mid_block", 0, widths[-1], widths[-1], last, middle)
        yield from _pair("mid_block", 1, widths[-1], widths[-1], last, 0)
    current = widths[-1]
    for index, width in enumerate(reversed(widths)):
        name, attends = f"up_blocks.{index}", config["up_block_types"][index].startswith("CrossAttn")
        level = last - index
        for place in range(counts[level] + 1):
            blocks = up[index][place] if attends else 0
            yield from _pair(name, place, current + skips.pop(), width, level, blocks)
            current = width
        if index < last:
            yield Unit(f"{name}.upsamplers.0.conv", "resize", width, width, level - 1)


def time_width(config: Mapping[str, Any]) -> int:
    """Return the channels of the embedded timestep."""
    return int(config["time_embedding_dim"] or 4 * config["block_out_channels"][0])


def text_vector_width(config: Mapping[str, Any], time_ids: int) -> int:
    """Return the channels of the pooled text that stands beside the embedded sizes (SDXL)."""
    sizes = time_ids * int(config["addition_time_embed_dim"])
    return int(config["projection_class_embeddings_input_dim"]) - sizes


def sides(config: Mapping[str, Any]) -> list[int]:
    """Return the side of the square image at every level, from the reference size down."""
    found = [int(config["sample_size"])]
    for _ in pairwise(config["block_out_channels"]):
        # With a padding of 0 the stock class pads the far edges alone.
        found.append((found[-1] + config["downsample_padding"]) // 2)
    return found


def unet_macs(config: Mapping[str, Any], *, attention_products: bool) -> int:
    """Count the multiply-accumulates of one forward, batch 1, at the reference input."""
    pixels = [side * side for side in sides(config)]
    total = 0
    for layer in layers(config):
        if len(layer.weight) == 1:
            continue
        size = 1
        for length in layer.weight:
            size *= length
        total += size * {"image": pixels[layer.level], "text": TEXT_TOKENS, "vector": 1}[layer.reads]
    if attention_products:
        for unit in units(config):
            keys = pixels[unit.level] + TEXT_TOKENS
            total += unit.blocks * 2 * pixels[unit.level] * keys * unit.outputs
    return total


def _pair(name: str, place: int, inputs: int, outputs: int, level: int, blocks: int) -> Iterator[Unit]:
    yield Unit(f"{name}.resnets.{place}", "resnet", inputs, outputs, level)
    if blocks:
        yield Unit(f"{name}.attentions.{place}", "attention", outputs, outputs, level, blocks)


def _conv(name: str, outputs: int, inputs: int, kernel: int, level: int) -> Layer:
    return Layer(name, (outputs, inputs, kernel, kernel), level=level)


def _mlp(name: str, inputs: int, width: int) -> Iterator[Layer]:
    yield Layer(f"{name}.linear_1", (width, inputs), reads="vector")
    yield Layer(f"{name}.linear_2", (width, width), reads="vector")


def _unit_layers(config: Mapping[str, Any], unit: Unit, time: int) -> Iterator[Layer]:
    if unit.kind == "resize":
        yield _conv(unit.name, unit.outputs, unit.inputs, 3, unit.level)
    elif unit.kind == "resnet":
        yield from _resnet_layers(unit, time)
    else:
        yield from _attention_layers(config, unit)


def _resnet_layers(unit: Unit, time: int) -> Iterator[Layer]:
    yield Layer(f"{unit.name}.norm1", (unit.inputs,))
    yield _conv(f"{unit.name}.conv1", unit.outputs, unit.inputs, 3, unit.level)
    yield Layer(f"{unit.name}.time_emb_proj", (unit.outputs, time), reads="vector")
    yield Layer(f"{unit.name}.norm2", (unit.outputs,))
    yield _conv(f"{unit.name}.conv2", unit.outputs, unit.outputs, 3, unit.level)
    if unit.inputs != unit.outputs:
        yield _conv(f"{unit.name}.conv_shortcut", unit.outputs, unit.inputs, 1, unit.level)


def _attention_layers(config: Mapping[str, Any], unit: Unit) -> Iterator[Layer]:
    width, level = unit.outputs, unit.level
    text = per_stage(config, "cross_attention_dim")[0]
    square = (width, width) if config["use_linear_projection"] else (width, width, 1, 1)
    yield Layer(f"{unit.name}.norm", (width,))
    yield Layer(f"{unit.name}.proj_in", square, level=level)
    for index in range(unit.blocks):
        block = f"{unit.name}.transformer_blocks.{index}"
        for norm in ("norm1", "norm2", "norm3"):
            yield Layer(f"{block}.{norm}", (width,))
        for attention in ("attn1", "attn2"):
            yield Layer(f"{block}.{attention}.to_q", (width, width), bias=False, level=level)
            source: tuple[int, Reads] = (width, "image") if attention == "attn1" else (text, "text")
            for letter in "kv":
                name = f"{block}.{attention}.to_{letter}"
                yield Layer(name, (width, source[0]), bias=False, reads=source[1], level=level)
            yield Layer(f"{block}.{attention}.to_out.0", (width, width), level=level)
        yield Layer(f"{block}.ff.net.0.proj", (8 * width, width), level=level)
        yield Layer(f"{block}.ff.net.2", (width, 4 * width), level=level)
    yield Layer(f"{unit.name}.proj_out", square, level=level)
