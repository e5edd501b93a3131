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
_CACHE_ELEMENTS = 2**18
_CUDA_ROWS = 17


class Tokens(NamedTuple):
    """Quantized rows: x ~ (q + zero) * scale.

    Attributes:
        q: int8 [M, K].
        scale: float32 [M, 1].
        zero: float32 [M, 1], None where it is part of `q` or the grid is symmetric.
        total: float32 [M, 1], sum of `q` over K, exact; None where it was not asked for.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor | None
    total: Tensor | None


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


def _chunk_rows(width: int) -> int:
    """Return how many rows of `width` float32 values fit the cache of a core."""
    return max(1, _CACHE_ELEMENTS // width)


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return integers as floats [M, K], scale [M, 1], no zero."""
    top = (1 << (bits - 1)) - 1
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / top).clamp_min(_TINY)
    return (x / scale).round_(), scale, None


def _asymmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return integers as floats [M, K], scale [M, 1], and the zero [M, 1] where it is apart."""
    top = (1 << (bits - 1)) - 1
    low = x.amin(dim=-1, keepdim=True).float().clamp_max(0)
    high = x.amax(dim=-1, keepdim=True).float().clamp_min(0)
    scale = ((high - low) / (2 * top + 1)).clamp_min(_TINY)
    zero = torch.round(low / scale) + (top + 1)
    level = (x / scale).round_().sub_(zero).clamp_(-top - 1, top)
    return (level.add_(zero), scale, None) if bits < 8 else (level, scale, zero)


def _quantize_rows(x: Tensor, bits: int, symmetric: bool, total: bool) -> Tokens:
    level, scale, zero = (_symmetric if symmetric else _asymmetric)(x, bits)
    return Tokens(level.to(torch.int8), scale, zero, level.sum(dim=-1, keepdim=True) if total else None)


def quantize_tokens(x: Tensor, bits: int, symmetric: bool, total: bool = False) -> Tokens:
    """Quantize each row of x [M, K] (any float dtype) with its own scale.

    Symmetric: s = max|x| / (2^(b-1) - 1). Asymmetric: s = (max(x, 0) - min(x, 0)) / (2^b - 1) with
    the zero point on the grid. Below 8 bits the zero point is added to the integers, which still
    fit int8.

    Args:
        x: rows.
        bits: 4, 6 or 8.
        symmetric: which grid.
        total: also sum the integers of each row.
    """
    rows = _chunk_rows(x.shape[1])
    # A compiler fuses the passes by itself; here each run of rows stays in the cache between them.
    if torch.compiler.is_compiling() or x.is_cuda or x.shape[0] <= rows:
        return _quantize_rows(x, bits, symmetric, total)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    parts: list[Tokens] = []
    for target, part in zip(q.split(rows), x.split(rows), strict=True):
        tokens = _quantize_rows(part, bits, symmetric, total)
        target.copy_(tokens.q)
        parts.append(tokens)
    scale = torch.cat([part.scale for part in parts])
    zeros = [part.zero for part in parts if part.zero is not None]
    totals = [part.total for part in parts if part.total is not None]
    return Tokens(q, scale, torch.cat(zeros) if zeros else None, torch.cat(totals) if totals else None)


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


def _corrected(
    level: Tensor, tokens: Tokens, weight: IntegerWeight, index: int, total: Tensor | None
) -> Tensor:
    """Add what the zero points contribute to float32 `level` [M, N], in place."""
    zero = weight.zero
    if zero is not None and total is not None:
        level.addcmul_(total, zero[index])
    if tokens.zero is not None and weight.sums is not None:
        level.addcmul_(tokens.zero, weight.sums[index])
    return level


def _rows_of(tokens: Tokens, start: int, stop: int) -> Tokens:
    zero = None if tokens.zero is None else tokens.zero[start:stop]
    total = None if tokens.total is None else tokens.total[start:stop]
    return Tokens(tokens.q[start:stop], tokens.scale[start:stop], zero, total)


def _finish(accumulated: Tensor, tokens: Tokens, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    """Turn int32 [M, N] into s_x s_w (sum + corrections) + bias, float32."""
    level = accumulated * tokens.scale if weight.zero is None and tokens.zero is None else None
    if level is None:
        level = _corrected(accumulated.float(), tokens, weight, 0, tokens.total).mul_(tokens.scale)
    return level * weight.scale[0] if bias is None else torch.addcmul(bias.float(), level, weight.scale[0])


def _per_channel(tokens: Tokens, weight: IntegerWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    accumulated = matmul(tokens.q, weight.q)
    rows = _chunk_rows(accumulated.shape[1])
    count = accumulated.shape[0]
    if torch.compiler.is_compiling() or accumulated.is_cuda or count <= rows:
        return _finish(accumulated, tokens, weight, bias).to(dtype)
    y = torch.empty(accumulated.shape, dtype=dtype)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        y[part] = _finish(accumulated[part], _rows_of(tokens, start, start + rows), weight, bias)
    return y


def _per_group(tokens: Tokens, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    groups, outputs = weight.scale.shape
    width = tokens.q.shape[1] // groups
    total = torch.zeros(tokens.q.shape[0], outputs, device=tokens.q.device)
    for index in range(groups):
        columns = slice(index * width, (index + 1) * width)
        q = tokens.q[:, columns].contiguous()
        level = matmul(q, weight.q[:, columns].contiguous()).float()
        row_sum = None
        if weight.zero is not None:
            row_sum = q.sum(dim=-1, keepdim=True, dtype=torch.int32).float()
        total.addcmul_(_corrected(level, tokens, weight, index, row_sum), weight.scale[index])
    total = total * tokens.scale
    return total if bias is None else total + bias


def linear(tokens: Tokens, weight: IntegerWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias in `dtype`, [M, N], from integer products.

    One product for a weight with one scale per output channel, else one per group of input channels,
    summed in float32. `tokens.total` must be there where a per-channel weight has a zero.
    """
    if weight.scale.shape[0] == 1:
        return _per_channel(tokens, weight, bias, dtype)
    return _per_group(tokens, weight, bias).to(dtype)
