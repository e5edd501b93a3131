"""Our runtime's layers made from plain torch ones, with the grids of `rtn` and no calibration."""

from __future__ import annotations

import torch
from compress.runtime import packing
from compress.runtime.conv import QuantizedConv2d
from compress.runtime.linear import QuantizedLinear
from compress.runtime.manifest import ActivationScheme, QuantizedModule, RotationScheme
from compress.runtime.rotation import Rotation, random_signs
from compress.runtime.windows import kernel_of
from torch import Tensor, nn


def quantized(linear: nn.Linear, bits: int, *, transforms: bool, seed: int) -> QuantizedLinear:
    """Return an integer layer: min-max weight rows with zero points, 8-bit symmetric tokens.

    Args:
        linear: with a bias; its dtype becomes the layer's.
        bits: of a weight.
        transforms: add a run-time channel scale (of ones) and a block rotation.
        seed: of the rotation's signs.
    """
    weight = linear.weight.detach().float()
    rows, columns = weight.shape
    block = 128 if columns % 128 == 0 else 64
    scheme = QuantizedModule(
        shape=(rows, columns),
        bits=bits,  # type: ignore[arg-type]
        symmetric=False,
        activation=ActivationScheme(bits=8),
        bias=True,
        method="rtn",
        input_scale=transforms,
        rotation=RotationScheme(block=block) if transforms else None,
    )
    tensors: dict[str, Tensor] = {"bias": linear.bias.detach()}
    if transforms:
        signs = random_signs(columns, torch.Generator().manual_seed(seed))
        tensors |= {"input_scale": torch.ones(columns), "rotation_sign": signs}
        weight = Rotation(signs, block)(weight)
    half = 2 ** (bits - 1)
    low, high = weight.amin(1, keepdim=True).clamp_max(0), weight.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / (2 * half - 1)
    zero = torch.round(low / scale) + half
    levels = torch.clamp(torch.round(weight / scale) - zero, -half, half - 1).to(torch.int8)
    tensors |= {
        "qweight": levels if bits == 8 else packing.pack(levels, bits),
        "scale": scale,
        "zero_point": zero.to(torch.int16 if bits == 8 else torch.int8),
    }
    return QuantizedLinear.from_tensors(scheme, linear.bias.dtype, tensors)


def quantize_blocks(module: nn.Module, bits: int, *, transforms: bool, seed: int) -> nn.Module:
    """Replace the attention and feed-forward linears of a DiT's blocks, in place."""
    names = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and (".attn1." in name or ".ff." in name)
    ]
    for name in names:
        layer = quantized(module.get_submodule(name), bits, transforms=transforms, seed=seed)
        module.set_submodule(name, layer)
    return module


def quantized_conv(conv: nn.Conv2d, bits: int, *, activation_bits: int) -> QuantizedConv2d:
    """Return an integer convolution: min-max weight rows, symmetric, and one 8-bit scale an image.

    Args:
        conv: of one group, with a bias; its dtype becomes the layer's.
        bits: of a weight.
        activation_bits: 8, or 16 for weights alone.
    """
    weight = conv.weight.detach().float().flatten(1)
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / top
    levels = torch.round(weight / scale).to(torch.int8)
    scheme = QuantizedModule(
        shape=(weight.shape[0], weight.shape[1]),
        bits=bits,  # type: ignore[arg-type]
        symmetric=True,
        activation=ActivationScheme(bits=8, scope="sample") if activation_bits == 8 else None,
        bias=True,
        kernel=kernel_of(conv),
        method="rtn",
    )
    packed = levels if bits == 8 else packing.pack(levels, bits)
    tensors = {"qweight": packed, "scale": scale, "bias": conv.bias.detach()}
    return QuantizedConv2d.from_tensors(scheme, conv.bias.dtype, tensors)
