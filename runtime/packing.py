"""Integers of 2, 3, 4 and 6 bits as a dense bit stream of bytes, row by row.

A row of n values of b bits takes ceil(n * b / 8) bytes: value + 2^(b-1), low bits first, no padding
between values. At 4 bits a byte holds two values (the first in its low half).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED_BITS = (2, 3, 4, 6)


def packed_width(columns: int, bits: int) -> int:
    """Return the bytes of one packed row of `columns` values."""
    return (columns * bits + 7) // 8


def _unit(bits: int) -> tuple[int, int]:
    """Return (values, bytes) of the smallest run that ends on a byte boundary."""
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits} bits are not packed; packed are {PACKED_BITS}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers.

    Args:
        values: [rows, columns] of any integer dtype, each in [-2^(bits-1), 2^(bits-1) - 1].
        bits: of one value; 2, 3, 4 or 6.

    Returns:
        uint8 [rows, ceil(columns * bits / 8)].

    Raises:
        ValueError: for other bits, or a value outside the range.
    """
    count, width = _unit(bits)
    half = 1 << (bits - 1)
    if values.numel() and (int(values.min()) < -half or int(values.max()) >= half):
        raise ValueError(f"a value lies outside the range of {bits} bits")
    rows, columns = values.shape
    unsigned = F.pad(values.to(torch.int32) + half, (0, -columns % count)).view(rows, -1, count)
    word = unsigned[..., 0].clone()
    for index in range(1, count):
        word |= unsigned[..., index] << (bits * index)
    packed = torch.stack([(word >> (8 * index)) & 255 for index in range(width)], dim=-1)
    return packed.to(torch.uint8).view(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack`.

    Args:
        packed: uint8 [rows, ceil(columns * bits / 8)].
        bits: of one value.
        columns: values per row.

    Returns:
        int8 [rows, columns], contiguous.
    """
    count, width = _unit(bits)
    rows = packed.shape[0]
    whole = F.pad(packed, (0, -packed.shape[1] % width)).view(rows, -1, width)
    if width == 1:
        parts = [(whole[..., 0] >> (bits * index)) & ((1 << bits) - 1) for index in range(count)]
    else:
        word = whole[..., 0].to(torch.int32)
        for index in range(1, width):
            word = word | (whole[..., index].to(torch.int32) << (8 * index))
        parts = [((word >> (bits * index)) & ((1 << bits) - 1)).to(torch.uint8) for index in range(count)]
    values = torch.stack(parts, dim=-1).view(rows, -1)[:, :columns].to(torch.int8)
    return (values - (1 << (bits - 1))).contiguous()
