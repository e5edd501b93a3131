"""Integer matrix products with dynamic per-token activation scales.

A token's row x [K] becomes integers q_x with one scale s_x; weights are integers q_w with one scale
s_w per output channel (or per group of input channels). The product of the integers is exact in
int32, so y = s_x s_w (sum q_x q_w + z_w sum q_x + ...) differs from the fake-quantized reference by
float rounding alone. Grids: arXiv 2406.02540.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-30
_CUDA_MULTIPLE = 8
_CUDA_ROWS = 17


class Tokens(NamedTuple):
    """Quantized rows: x ~ (q + zero) * scale.

    Attributes:
        q: int8 [M, K].
        scale: float32 [M, 1].
        zero: float32 [M, 1], None where it is part of `q` or the grid is symmetric.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None


class IntegerWeight(NamedTuple):
    """A weight laid out for the integer product: W = (q + zero) * scale, group by group.

    Attributes:
        q: int8 [N, K], contiguous.
        scale: float32 [groups, N].
        zero: float32 [groups, N], None where it is part of `q` or the grid is symmetric.
        sums: float32 [groups, N], sum of (q + zero) over the group; None unless tokens have a zero.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None


def quantize_tokens(x: Tensor, bits: int, symmetric: bool) -> Tokens:
    """Quantize each row of x [M, K] (any float dtype) with its own scale.

    Symmetric: s = max|x| / (2^(b-1) - 1). Asymmetric: s = (max(x, 0) - min(x, 0)) / (2^b - 1) with
    the zero point on the grid. Below 8 bits the zero point is added to the integers, which still
    fit int8.
    """
    top = (1 << (bits - 1)) - 1
    if symmetric:
        scale = (x.abs().amax(dim=-1, keepdim=True).float() / top).clamp_min(_TINY)
        return Tokens(torch.round(x / scale).to(torch.int8), scale, None)
    low = x.amin(dim=-1, keepdim=True).float().clamp_max(0)
    high = x.amax(dim=-1, keepdim=True).float().clamp_min(0)
    scale = ((high - low) / (2 * top + 1)).clamp_min(_TINY)
    zero = torch.round(low / scale) + (top + 1)
    level = torch.clamp(torch.round(x / scale) - zero, -top - 1, top)
    if bits < 8:
        return Tokens((level + zero).to(torch.int8), scale, None)
    return Tokens(level.to(torch.int8), scale, zero)


def fake_quantize_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return x [M, K] rounded to the grid of `quantize_tokens`, in float32."""
    tokens = quantize_tokens(x, bits, symmetric)
    level = tokens.q.float() if tokens.zero is None else tokens.q.float() + tokens.zero
    return level * tokens.scale


def integer_weight(
    q: Tensor, scale: Tensor, zero: Tensor | None, bits: int, token_zero: bool
) -> IntegerWeight:
    """Lay a weight out for `linear`.

    Args:
        q: int8 [N, K].
        scale: [N, groups] float.
        zero: [N, groups] integer, or None.
        bits: of the weight; below 8 the zero point is added to `q`, which still fits int8.
        token_zero: whether activations come with a separate zero point.
    """
    groups = scale.shape[1]
    if zero is not None and bits < 8:
        per_group = q.view(q.shape[0], groups, -1) + zero.to(torch.int8).unsqueeze(-1)
        q, zero = per_group.view(q.shape), None
    offset = None if zero is None else zero.float().t().contiguous()
    sums = None
    if token_zero:
        per_group = q.view(q.shape[0], groups, -1)
        sums = per_group.sum(dim=-1, dtype=torch.int32).float().t().contiguous()
        if offset is not None:
            sums = sums + offset * (q.shape[1] // groups)
    return IntegerWeight(q.contiguous(), scale.float().t().contiguous(), offset, sums)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 a [M, K] by the transpose of int8 b [N, K]: exact int32 [M, N].

    CUDA's kernel needs more than 16 rows and multiples of 8: both sides are padded with zeros.
    """
    if not a.is_cuda:
        return torch._int_mm(a, b.t())
    rows, columns = a.shape
    outputs = b.shape[0]
    more_rows = max(_CUDA_ROWS - rows, 0)
    more_rows += -(rows + more_rows) % _CUDA_MULTIPLE
    more_columns, more_outputs = -columns % _CUDA_MULTIPLE, -outputs % _CUDA_MULTIPLE
    if more_rows or more_columns:
        a = F.pad(a, (0, more_columns, 0, more_rows))
    if more_columns or more_outputs:
        b = F.pad(b, (0, more_columns, 0, more_outputs))
    return torch._int_mm(a, b.t())[:rows, :outputs]


def _group(tokens: Tokens, weight: IntegerWeight, index: int, width: int) -> Tensor:
    """Return sum over one group of (q_x + z_x)(q_w + z_w) * s_w: float32 [M, N]."""
    columns = slice(index * width, (index + 1) * width)
    q, w = tokens.q[:, columns], weight.q[:, columns]
    if weight.scale.shape[0] > 1:
        q, w = q.contiguous(), w.contiguous()
    level = matmul(q, w).float()
    if weight.zero is not None:
        level = level + q.sum(dim=-1, keepdim=True, dtype=torch.int32) * weight.zero[index]
    if tokens.zero is not None and weight.sums is not None:
        level = level + tokens.zero * weight.sums[index]
    return level * weight.scale[index]


def linear(tokens: Tokens, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias, float32 [M, N], from integer products: one per group of input channels."""
    groups = weight.scale.shape[0]
    width = tokens.q.shape[1] // groups
    total = _group(tokens, weight, 0, width)
    for index in range(1, groups):
        total = total + _group(tokens, weight, index, width)
    total = total * tokens.scale
    return total if bias is None else total + bias
