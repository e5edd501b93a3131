"""Integer matrix products with dynamic per-token activation scales.

A token's row x [K] becomes integers q_x with one scale s_x; weights are integers q_w with one scale
s_w per output channel (or per group of input channels). The product of the integers is exact in
int32, so y = s_x s_w (sum q_x q_w + z_w sum q_x + ...) differs from the fake-quantized reference by
float rounding alone. Grids: arXiv 2406.02540.

What is here runs on every device and under `torch.compile`; `prepacked` is the faster way on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = 1e-30
_CUDA_MULTIPLE = 8
_CUDA_ROWS = 17
_CACHE_ELEMENTS = 2**17
"""Float32 values, read and written, that a core's second-level cache holds."""
ROUNDER = 1.5 * 2**23
"""A float32 that rounds half to even what is added to it; the sum's lowest byte is that integer."""
_HIGH_PART = 16
_FEW_ROWS = 8


class Tokens(NamedTuple):
    """Quantized rows: x ~ (q + zero) * scale.

    Attributes:
        q: int8 [M, K]; or uint8 [M, K], which is q + 128.
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


def cache_rows(width: int, elements: int = _CACHE_ELEMENTS) -> int:
    """Return how many rows of `width` values make `elements` for every thread, at least one."""
    return max(1, elements * torch.get_num_threads() // width)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _extremes(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return least and greatest value of each row of the parts together: [M, 1]; NaN for a row with one."""
    pairs = [(part.amin(dim=-1, keepdim=True), part.amax(dim=-1, keepdim=True)) for part in parts]
    return _joined([low for low, _ in pairs]), _joined([high for _, high in pairs])


def _largest(parts: Sequence[Tensor]) -> Tensor:
    """Return the greatest absolute value of each row: float32 [M, 1]; NaN for a row that has one."""
    if parts[0].dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling():
        # Without the sign the bits of a float are ordered as its values are, NaN above all.
        bits = [(part.view(torch.int16) & 0x7FFF).amax(dim=-1, keepdim=True) for part in parts]
        return _joined(bits).view(parts[0].dtype).float()
    low, high = _extremes(parts)
    return torch.maximum(high, low.neg()).float()


def _grid(parts: Sequence[Tensor], bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return scale and zero point of each row, float32 [M, 1]; no zero on a symmetric grid."""
    top = float((1 << (bits - 1)) - 1)
    if symmetric:
        return (_largest(parts) / top).clamp_min(_TINY), None
    low, high = _extremes(parts)
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale = ((high - low) / (2 * top + 1)).clamp_min(_TINY)
    return scale, torch.round(low / scale) + (top + 1)


def _quantize_whole(x: Tensor, bits: int, symmetric: bool, total: bool) -> Tokens:
    """Quantize as plain tensor expressions, for a compiler to fuse."""
    scale, zero = _grid((x,), bits, symmetric)
    level = (x * scale.reciprocal()).round_()
    if zero is not None:
        top = (1 << (bits - 1)) - 1
        level = level.sub_(zero).clamp_(-top - 1, top)
        if bits < 8:
            level, zero = level.add_(zero), None
    return Tokens(level.to(torch.int8), scale, zero, level.sum(dim=-1, keepdim=True) if total else None)


def _round_part(
    x: Tensor, inverse: Tensor, zero: Tensor | None, bits: int, rounder: Tensor, buffer: Tensor
) -> Tensor:
    """Return integers in the lowest bytes of an int32 view of `buffer` [rows, K], which is float32."""
    if x.dtype != torch.float32:
        x = buffer.copy_(x)
    if zero is None:
        torch.addcmul(rounder, x, inverse, out=buffer)
    else:
        top = (1 << (bits - 1)) - 1
        torch.mul(x, inverse, out=buffer).round_().sub_(zero).clamp_(-top - 1, top)
        buffer.add_(rounder if bits == 8 else rounder + zero)
    return buffer.view(torch.int32)


def _quantize_parts(x: Tensor, bits: int, symmetric: bool, unsigned: bool) -> Tokens:
    """Quantize with few passes over memory: every part stays in the cache from one to the next."""
    count, width = x.shape
    rows = max(1, -(-count // max(1, -(-count // cache_rows(width)))))
    parts = x.split(rows)
    scale, zero = _grid(parts, bits, symmetric)
    inverses = scale.reciprocal().split(rows)
    zeros = [None] * len(parts) if zero is None else zero.split(rows)
    q = torch.empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    buffer = torch.empty(rows, width)
    rounder = torch.full((width,), ROUNDER + 128 if unsigned else ROUNDER)
    for part, inverse, offset, target in zip(parts, inverses, zeros, q.split(rows), strict=True):
        space = buffer if part.shape[0] == rows else buffer[: part.shape[0]]
        target.copy_(_round_part(part, inverse, offset, bits, rounder, space))
    return Tokens(q, scale, zero if bits == 8 else None, None)


def _quantize_wide(x: Tensor, bits: int, symmetric: bool, unsigned: bool) -> Tokens:
    """Quantize rows that are wider than the cache, such as whole images: piece by piece."""
    width = cache_rows(1)
    q = torch.empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    buffer = torch.empty(1, width)
    rounder = torch.full((width,), ROUNDER + 128 if unsigned else ROUNDER)
    scales, zeros = [], []
    for row, target in zip(x.split(1), q.split(1), strict=True):
        pieces = row.split(width, dim=1)
        ends = (_largest(pieces),) if symmetric else _extremes(pieces)
        scale, zero = _grid((torch.cat(ends).view(1, -1),), bits, symmetric)
        inverse = scale.reciprocal()
        for piece, place in zip(pieces, target.split(width, dim=1), strict=True):
            count = piece.shape[1]
            place.copy_(_round_part(piece, inverse, zero, bits, rounder[:count], buffer[:, :count]))
        scales.append(scale)
        zeros += [] if zero is None else [zero]
    return Tokens(q, torch.cat(scales), torch.cat(zeros) if zeros and bits == 8 else None, None)


def quantize_tokens(
    x: Tensor, bits: int, symmetric: bool, total: bool = False, *, unsigned: bool = False
) -> Tokens:
    """Quantize each row of x [M, K] (any float dtype) with its own scale.

    Symmetric: s = max|x| / (2^(b-1) - 1). Asymmetric: s = (max(x, 0) - min(x, 0)) / (2^b - 1) with
    the zero point on the grid. Below 8 bits the zero point is added to the integers, which still
    fit int8. Integers are x times the reciprocal of s, rounded half to even; they carry no gradient.

    Args:
        x: rows.
        bits: 4, 6 or 8.
        symmetric: which grid.
        total: also sum the integers of each row.
        unsigned: store q + 128 as uint8; on a CPU, outside of `torch.compile`, without `total`.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return _quantize_whole(x, bits, symmetric, total)
    in_cache = x.shape[1] <= cache_rows(1)
    tokens = (_quantize_parts if in_cache else _quantize_wide)(x.detach(), bits, symmetric, unsigned)
    if not total:
        return tokens
    return tokens._replace(total=tokens.q.sum(dim=-1, keepdim=True, dtype=torch.int32).float())


def fake_quantize_tokens(x: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Return x [M, K] rounded to the grid of `quantize_tokens`, in float32."""
    return dequantized(quantize_tokens(x, bits, symmetric))


def dequantized(tokens: Tokens) -> Tensor:
    """Return the float32 values [M, K] that quantized rows stand for, their integers signed."""
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


@lru_cache(maxsize=1)
def _probe_products() -> bool:
    q = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(q, q.t()) == 64 * 127 * 127).all())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def cpu_products_are_exact() -> bool:
    """Tell whether this CPU adds int8 products up exactly: without VNNI, pairs saturate at 16 bits."""
    return _probe_products()


def _cpu_matmul(a: Tensor, b: Tensor) -> Tensor:
    if cpu_products_are_exact():
        return torch._int_mm(a, b.t())
    # Two products with few enough bits that no sum of a pair leaves 16 bits.
    high = torch.div(b, _HIGH_PART, rounding_mode="floor")
    low = b - high * _HIGH_PART
    return torch._int_mm(a, high.t()).mul_(_HIGH_PART).add_(torch._int_mm(a, low.t()))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply int8 a [M, K] by the transpose of int8 b [N, K]: exact int32 [M, N].

    CUDA's kernel needs more than 16 rows and multiples of 8: both sides are padded with zeros.
    """
    if not a.is_cuda:
        return _cpu_matmul(a, b)
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


def float_linear(x: Tensor, q: Tensor) -> Tensor:
    """Return x q^T for float rows x [M, K] and int8 q [N, K]: float32 [M, N], rounded as floats are.

    The weight becomes floats for this call; for few rows piece by piece, which stay in the cache.
    """
    few = x.shape[0] <= _FEW_ROWS
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not (few or x.dtype == torch.float32):
        return F.linear(x, q.to(x.dtype)).float()
    x = x.float()
    return torch.cat([F.linear(x, part.float()) for part in q.split(cache_rows(q.shape[1]))], dim=-1)


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


def _per_channel(tokens: Tokens, weight: IntegerWeight, bias: Tensor | None) -> Tensor:
    accumulated = matmul(tokens.q, weight.q)
    if weight.zero is None and tokens.zero is None:
        level = accumulated * tokens.scale
    else:
        level = _corrected(accumulated.float(), tokens, weight, 0, tokens.total).mul_(tokens.scale)
    return level * weight.scale[0] if bias is None else torch.addcmul(bias.float(), level, weight.scale[0])


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
    each = _per_channel if weight.scale.shape[0] == 1 else _per_group
    return each(tokens, weight, bias).to(dtype)
