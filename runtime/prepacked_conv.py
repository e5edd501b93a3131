"""Integer convolutions on x86 CPUs: oneDNN's own, which lays out no windows.

The kernel convolves uint8 levels (q + 128) with int8 weights, adds up in int32, pads with the level
that stands for zero, and applies both scales and the bias in the same pass. It takes one scale and
one zero point of the input per call, so items with scales of their own are convolved one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .manifest import KernelScheme

OFFSET = 128
_MOST_COLUMNS = 2**16
"""Windows of more values could leave int32."""


class PackedConv(NamedTuple):
    """A convolution's weight of one scale per output channel.

    Attributes:
        q: int8 [N, C, height, width] in oneDNN's own layout.
        scale: float32 [N].
        zero: float32 [N], zero * scale; None where all are 0.
        no_zeros: int64 [N] of 0: the kernel takes zero points, and only 0 for a weight.
        bias: float32 [N] or None.
        kernel: window of the convolution.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    no_zeros: Tensor
    bias: Tensor | None
    kernel: KernelScheme


def pack(
    q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, kernel: KernelScheme
) -> PackedConv:
    """Lay out the weight (q + zero) * scale: int8 q [N, C, height, width], float32 scale and zero [N]."""
    stride, padding, dilation = _window(kernel)
    laid_out: Tensor = torch.ops.onednn.qconv_prepack.default(
        q, scale, 1.0, OFFSET, stride, padding, dilation, 1, None
    )
    no_zeros = torch.zeros(scale.shape[0], dtype=torch.int64)
    offset = None if zero is None or not zero.any() else zero * scale
    return PackedConv(laid_out, scale, offset, no_zeros, None if bias is None else bias.float(), kernel)


def _window(kernel: KernelScheme) -> tuple[list[int], list[int], list[int]]:
    return list(kernel.stride), list(kernel.padding), list(kernel.dilation)


def _convolve(q: Tensor, scale: float, zero: int, weight: PackedConv, dtype: torch.dtype) -> Tensor:
    stride, padding, dilation = _window(weight.kernel)
    y: Tensor = torch.ops.onednn.qconv2d_pointwise.default(
        q, scale, zero, weight.q, weight.scale, weight.no_zeros, weight.bias,
        stride, padding, dilation, 1, 1.0, 0, dtype, "none", [], "",
    )  # fmt: skip
    return y


@lru_cache(maxsize=1)
def _probe() -> bool:
    capable = torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512", "AMX"))
    if not (capable and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.onednn, "qconv_prepack") or not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    kernel = KernelScheme(size=(3, 3), padding=(1, 1))
    weight = pack(torch.full((48, 40, 3, 3), 127, dtype=torch.int8), torch.ones(48), None, None, kernel)
    q = torch.full((1, 40, 8, 8), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    inside = _convolve(q, 1.0, OFFSET, weight, torch.float32)[:, :, 1:-1, 1:-1]
    return bool((inside == 360 * 127 * (255 - OFFSET)).all())


@lru_cache(maxsize=8)
def _writes(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN's kernel for this CPU writes results of this dtype."""
    kernel = KernelScheme(size=(3, 3))
    weight = pack(torch.ones(16, 16, 3, 3, dtype=torch.int8), torch.ones(16), None, None, kernel)
    q = torch.ones(1, 16, 4, 4, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    try:
        _convolve(q, 1.0, OFFSET, weight, dtype)
    except RuntimeError:  # "could not create a primitive descriptor"
        return False
    return True


def is_available(columns: int) -> bool:
    """Tell whether this torch has the kernel and this CPU runs it exactly for windows of `columns` values.

    Without VNNI instructions pairs of products saturate at 16 bits; what counts is what oneDNN
    chooses, so the largest integers are convolved once.
    """
    return columns <= _MOST_COLUMNS and _probe()


def convolve(
    q: Tensor, scales: Sequence[float], zeros: Sequence[int], weight: PackedConv, dtype: torch.dtype
) -> Tensor:
    """Convolve levels: x = (q - zero) * scale, padded with zeros, plus the bias.

    Args:
        q: uint8 [batch, C, height, width], channels last in memory.
        scales: of the items; a single one stands for all.
        zeros: levels that stand for zero, 0 to 255, as many.
        weight: of `pack`.
        dtype: of the result.

    Returns:
        [batch, N, height, width], channels last in memory.
    """
    if len(scales) == 1:
        return _with_zero(q, scales[0], zeros[0], weight, dtype)
    items = zip(q.split(1), scales, zeros, strict=True)
    return torch.cat([_with_zero(item, scale, zero, weight, dtype) for item, scale, zero in items])


def _with_zero(q: Tensor, scale: float, zero: int, weight: PackedConv, dtype: torch.dtype) -> Tensor:
    """Convolve, and add what the weight's zero points contribute: each times the sum of a window."""
    if weight.zero is None and not _writes(dtype):
        return _convolve(q, scale, zero, weight, torch.float32).to(dtype)
    if weight.zero is None:
        return _convolve(q, scale, zero, weight, dtype)
    stride, padding, dilation = _window(weight.kernel)
    pixels = q.sum(dim=1, keepdim=True, dtype=torch.int32).sub_(zero * q.shape[1]).float()
    ones = torch.ones(1, 1, *weight.kernel.size)
    totals = F.conv2d(pixels, ones, None, stride, padding, dilation).mul_(scale)
    y = _convolve(q, scale, zero, weight, torch.float32)
    return y.addcmul_(totals, weight.zero.view(1, -1, 1, 1)).to(dtype)
