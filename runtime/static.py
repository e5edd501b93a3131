"""Activations on one grid that calibration found, for all rows and all calls: static quantization.

Beside the dynamic grids of `integer` nothing is looked for while the model runs; what lies outside
the range takes its nearest end. Grids: arXiv 2405.17873 (MixDQ), whose zero point and step are ours
up to the offset that makes the integers signed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .integer import ROUNDER, Tokens, cache_rows

_TINY = 1e-30


def grid_of_range(low: float, high: float, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return the grid that covers low to high and has zero on it.

    Asymmetric: scale = (high - low) / (2^bits - 1), x ~ (q + zero_point) * scale with q from
    -2^(bits-1). Symmetric: scale = max(-low, high) / (2^(bits-1) - 1).

    Args:
        low: least value; above 0 it counts as 0.
        high: greatest value; below 0 it counts as 0.
        bits: 4, 6 or 8.
        symmetric: which grid.

    Returns:
        scale [1] float32, and zero point [1] int16, None on a symmetric grid.
    """
    ends = torch.tensor([[min(low, 0.0)], [max(high, 0.0)]], dtype=torch.float32)
    top = float((1 << (bits - 1)) - 1)
    if symmetric:
        return (ends.abs().amax(dim=0) / top).clamp_min(_TINY), None
    scale = ((ends[1] - ends[0]) / (2 * top + 1)).clamp_min(_TINY)
    return scale, (torch.round(ends[0] / scale) + (top + 1)).to(torch.int16)


def _ends(bits: int, symmetric: bool) -> tuple[int, int]:
    top = (1 << (bits - 1)) - 1
    return -top if symmetric else -top - 1, top


def _row_scale(level: Tensor, scale: Tensor) -> Tensor:
    """Return the scale of each row [M, 1]: NaN for a row that has one, which integers cannot carry."""
    return torch.where(level.amax(dim=-1, keepdim=True).isnan(), torch.nan, scale)


def _quantize_whole(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, total: bool) -> Tokens:
    """Quantize as plain tensor expressions, for a compiler to fuse."""
    level = (x * scale.reciprocal()).round_()
    if zero is not None:
        level = level.sub_(zero)
    level = level.clamp_(*_ends(bits, zero is None))
    rows = _row_scale(level, scale)
    if zero is not None and bits < 8:
        level, zero = level.add_(zero), None
    offset = None if zero is None else zero.expand(len(x), 1)
    return Tokens(level.to(torch.int8), rows, offset, level.sum(dim=-1, keepdim=True) if total else None)


def _quantize_parts(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, unsigned: bool) -> Tokens:
    """Quantize with few passes over memory: every part stays in the cache from one to the next."""
    count, width = x.shape
    size = max(1, min(count, cache_rows(width)))
    low, high = _ends(bits, zero is None)
    offset = 0.0 if zero is None else float(zero)
    inverse = scale.reciprocal()
    raised = ROUNDER + (128 if unsigned else 0) + (offset if bits < 8 else 0)
    q = torch.empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    rows = torch.empty(count, 1)
    space = torch.empty(size, width)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        level = space[: part.stop - start]
        torch.mul(x[part], inverse, out=level).round_().sub_(offset).clamp_(low, high)
        rows[part] = _row_scale(level, scale)
        q[part] = level.add_(raised).view(torch.int32)
    separate = zero is not None and bits == 8
    return Tokens(q, rows, torch.full((count, 1), offset) if separate else None, None)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    total: bool = False,
    *,
    unsigned: bool = False,
) -> Tokens:
    """Quantize the rows of x [M, K] (any float dtype), all on one grid.

    Integers are x times the reciprocal of the scale, rounded half to even and held within the grid.
    They carry no gradient. A row with a NaN gets the scale NaN, so that it is not lost.

    Args:
        x: rows.
        scale: [1] float32.
        zero_point: [1] integer; None: the grid is symmetric.
        bits: 4, 6 or 8; below 8 the zero point is added to the integers, which still fit int8.
        total: also sum the integers of each row.
        unsigned: store q + 128 as uint8; on a CPU, outside of `torch.compile`, without `total`.

    Returns:
        As `integer.quantize_tokens`: scale and zero [M, 1].
    """
    zero = None if zero_point is None else zero_point.float()
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return _quantize_whole(x, scale, zero, bits, total)
    tokens = _quantize_parts(x.detach(), scale, zero, bits, unsigned)
    if not total:
        return tokens
    return tokens._replace(total=tokens.q.sum(dim=-1, keepdim=True, dtype=torch.int32).float())
