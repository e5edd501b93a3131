"""Integer products on x86 CPUs, with the weight laid out once in the order that the kernel reads.

oneDNN multiplies uint8 tokens (q + 128) by int8 weights, adds up in int32 and scales every output
channel in the same pass, so no int32 matrix goes through memory. Grids: arXiv 2406.02540.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .integer import IntegerWeight, Tokens, cache_rows, quantize_tokens

_OFFSET = 128
MOST_COLUMNS = 2**16
"""Rows of more values could leave int32: 255 * 127 a product, before the offset is taken out."""
_FINISH_ELEMENTS = 2**19
_SUM_COLUMNS = 16
_FEW_ELEMENTS = 2**17


class PackedWeight(NamedTuple):
    """A weight of one scale per output channel: W = (q + zero) * scale.

    Attributes:
        q: int8 [N, K] in oneDNN's own layout.
        scale: float32 [N].
        zero: float32 [N], zero * scale; None where all are 0.
        sums: float32 [N], sum of (q + zero) over K, times scale; None unless tokens have a zero.
        ones: all 1, [16, K] in oneDNN's layout: sums tokens, faster than a reduction; None where `zero` is.
        no_zeros: int64 [N] of 0: the kernel takes zero points, and only 0 for a weight.
        bias: float32 [N] or None.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None
    ones: Tensor | None
    no_zeros: Tensor
    bias: Tensor | None


def _pack(q: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack.default(q, None)
    return packed


def _product(q: Tensor, weight: Tensor, scale: Tensor, no_zeros: Tensor) -> Tensor:
    """Return sum_k (q - 128) w times the output channel's scale: float32 [M, N]."""
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        q, 1.0, _OFFSET, weight, scale, no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Tell whether this torch has the kernel and this CPU runs it exactly.

    Without VNNI instructions pairs of products saturate at 16 bits; other architectures have no fast
    kernel. What counts is what oneDNN chooses, so the largest integers are multiplied once.
    """
    capable = torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512", "AMX"))
    if not (capable and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return False
    columns = 72
    weight = torch.full((48, columns), 127, dtype=torch.int8)
    scale, no_zeros = torch.ones(48), torch.zeros(48, dtype=torch.int64)
    packed = _pack(weight)
    exact = columns * 127 * (255 - _OFFSET)
    tokens = torch.full((32, columns), 255, dtype=torch.uint8)
    return all(bool((_product(tokens[:count], packed, scale, no_zeros) == exact).all()) for count in (1, 32))


def pack(weight: IntegerWeight, bias: Tensor | None) -> PackedWeight:
    """Lay out a weight that has one scale per output channel."""
    scale = weight.scale[0]
    has_zero = weight.zero is not None and bool(weight.zero.any())
    zero = weight.zero[0] * scale if weight.zero is not None and has_zero else None
    return PackedWeight(
        q=_pack(weight.q),
        scale=scale,
        zero=zero,
        sums=None if weight.sums is None else weight.sums[0] * scale,
        ones=_pack(torch.ones(_SUM_COLUMNS, weight.q.shape[1], dtype=torch.int8)) if has_zero else None,
        no_zeros=torch.zeros(scale.shape[0], dtype=torch.int64),
        bias=None if bias is None else bias.float(),
    )


def _totals(q: Tensor, ones: Tensor) -> Tensor:
    """Return the exact sums of q - 128 over the rows of q [M, K]: float32 [M, 1]."""
    if q.numel() <= _FEW_ELEMENTS:
        return q.sum(dim=-1, keepdim=True, dtype=torch.int32).sub_(_OFFSET * q.shape[1]).float()
    no_zeros = torch.zeros(_SUM_COLUMNS, dtype=torch.int64)
    return _product(q, ones, torch.ones(_SUM_COLUMNS), no_zeros)[:, :1]


def _finish(y: Tensor, tokens: Tokens, total: Tensor | None, weight: PackedWeight, part: slice) -> Tensor:
    """Turn products y [rows, N], those of the tokens of `part`, into the layer's output, in place."""
    if total is not None and weight.zero is not None:
        y.addcmul_(total[part], weight.zero)
    if tokens.zero is not None and weight.sums is not None:
        y.addcmul_(tokens.zero[part], weight.sums)
    if weight.bias is None:
        return y.mul_(tokens.scale[part])
    return torch.addcmul(weight.bias, y, tokens.scale[part], out=y)


def linear(x: Tensor, weight: PackedWeight, bits: int, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """Quantize the rows of x [M, K], each with its own scale, and return x W^T + bias in `dtype`, [M, N].

    A row's result depends on that row alone, to the last bit. It carries no gradient.

    Args:
        x: rows, any float dtype, on a CPU.
        weight: from `pack`.
        bits: of an activation.
        symmetric: grid of the activations.
        dtype: of the result.
    """
    return multiply(quantize_tokens(x, bits, symmetric, unsigned=True), weight, dtype)


def multiply(tokens: Tokens, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias in `dtype`, [M, N], of the rows x that `tokens` holds as q + 128."""
    total = None if weight.ones is None else _totals(tokens.q, weight.ones)
    product = _product(tokens.q, weight.q, weight.scale, weight.no_zeros)
    count, outputs = product.shape
    rows = cache_rows(outputs, _FINISH_ELEMENTS)
    if count <= rows:
        return _finish(product, tokens, total, weight, slice(None)).to(dtype)
    y = product if dtype == torch.float32 else torch.empty(count, outputs, dtype=dtype)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        finished = _finish(product[part], tokens, total, weight, part)
        if y is not product:
            y[part] = finished
    return y
