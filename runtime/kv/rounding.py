"""Rounding of compressed keys and values to few bits: grids, packed storage, and the twin for training.

CSKV, arXiv 2409.10593: asymmetric grids, for keys per channel over consecutive tokens, for values per token
over channels. The official code clamps the zero point to [0, 2^bits - 1], which destroys every group that
does not straddle zero; here it is a float, the group's minimum, called offset. Scale and offset are float16,
the offset rounded down and the scale up, so that a group's range is always covered and no element is off by
more than scale / 2 (as long as it fits float16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..packing import pack, unpack

Axis = Literal["tokens", "channels"]
_HALF_MAX = 65504.0


def _below(x: Tensor) -> Tensor:
    """Round float32 to the next float16 that is not above."""
    x = x.clamp(-_HALF_MAX, _HALF_MAX)
    half = x.half()
    code = half.view(torch.int16)  # sign and magnitude; what is below zero rounds to no +0
    step = torch.where(half > 0, code - 1, code + 1)
    return torch.where(half.float() > x, step, code).view(torch.float16)


def _above(x: Tensor) -> Tensor:
    """Round float32 >= 0 to the next float16 that is not below."""
    x = x.clamp(0.0, _HALF_MAX)
    half = x.half()
    code = half.view(torch.int16)
    return torch.where(half.float() < x, code + 1, code).view(torch.float16)


def grid_of(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and offset, float16 [..., 1], of groups [..., group]."""
    offset = _below(groups.amin(dim=-1, keepdim=True).float())
    span = groups.amax(dim=-1, keepdim=True).float() - offset.float()
    return _above(span / (2**bits - 1)), offset


def integers_of(groups: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Return the integers of groups [..., group] on their grids, int32 in [0, 2^bits - 1]."""
    steps = (groups.float() - offset.float()) / scale.float().clamp(min=torch.finfo(torch.float32).tiny)
    return steps.round_().clamp_(0, 2**bits - 1).to(torch.int32)


def floats_of(integers: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Return what integers stand for, float32."""
    return integers.float() * scale.float() + offset.float()


def to_groups(c: Tensor, axis: Axis, group: int) -> Tensor:
    """Lay out compressed states so that the last axis is a group.

    Args:
        c: [batch, tokens, rank]; along `tokens` a multiple of `group`.
        axis: along which a group runs.
        group: its size. The last group of channels may have fewer: its last channel is repeated, which
            changes neither its minimum nor its maximum.

    Returns:
        [batch, tokens / group, rank, group] or [batch, tokens, ceil(rank / group), group].
    """
    batch, tokens, rank = c.shape
    if axis == "tokens":
        return c.view(batch, tokens // group, group, rank).transpose(2, 3)
    missing = -rank % group
    if missing:
        c = torch.cat([c, c[..., -1:].expand(batch, tokens, missing)], dim=-1)
    return c.reshape(batch, tokens, -1, group)


def from_groups(groups: Tensor, axis: Axis, rank: int) -> Tensor:
    """Undo `to_groups`: [batch, tokens, rank]."""
    if axis == "tokens":
        return groups.transpose(2, 3).reshape(groups.shape[0], -1, rank)
    return groups.flatten(2)[..., :rank]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c: Tensor, bits: int, axis: Axis, group: int) -> Tensor:
        groups = to_groups(c, axis, group)
        scale, offset = grid_of(groups, bits)
        rounded = floats_of(integers_of(groups, scale, offset, bits), scale, offset).to(c.dtype)
        inside = (groups > groups.amin(-1, keepdim=True)) & (groups < groups.amax(-1, keepdim=True))
        ctx.save_for_backward(from_groups(inside, axis, c.shape[-1]))
        return from_groups(rounded, axis, c.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


def _rounded(c: Tensor, bits: int, axis: Axis, group: int) -> Tensor:
    found: Tensor = _StraightThrough.apply(c, bits, axis, group)  # type: ignore[no-untyped-call]
    return found


def fake_quantize(c: Tensor, bits: int, axis: Axis, group: int) -> Tensor:
    """Round compressed states as the cache would and return them as floats; differentiable.

    The gradient passes straight through, and is zero at the ends of a group's range, as in the official code.

    Args:
        c: [batch, tokens, rank], floating point. Along `tokens`, tokens after the last whole group stay as
            they are, as in the cache.
        bits: 2 or 4.
        axis: `tokens` for keys, `channels` for values.
        group: elements that share a scale.

    Returns:
        Of c's shape and dtype.
    """
    if axis == "channels":
        return _rounded(c, bits, axis, group)
    whole = c.shape[1] // group * group
    if not whole:
        return c
    rounded = _rounded(c[:, :whole].contiguous(), bits, axis, group)
    return rounded if whole == c.shape[1] else torch.cat([rounded, c[:, whole:]], dim=1)


@dataclass
class PackedStates:
    """Compressed states as packed integers, with their grids.

    Attributes:
        integers: uint8; along tokens [batch, tokens / group, rank, bytes], along channels
            [batch, tokens, bytes].
        scale, offset: float16 [batch, tokens / group, rank] or [batch, tokens, groups].
    """

    integers: Tensor
    scale: Tensor
    offset: Tensor
    bits: int
    axis: Axis
    group: int
    rank: int

    @classmethod
    def of(cls, c: Tensor, bits: int, axis: Axis, group: int) -> PackedStates:
        """Quantize and pack [batch, tokens, rank]; along `tokens`, a multiple of `group`."""
        rank, groups = c.shape[-1], to_groups(c, axis, group)
        scale, offset = grid_of(groups, bits)
        integers = integers_of(groups, scale, offset, bits)
        if axis == "channels":
            integers = integers.flatten(2)[..., :rank]
        rows = integers.reshape(-1, integers.shape[-1]) - (1 << (bits - 1))
        packed = pack(rows, bits).view(*integers.shape[:-1], -1)
        return cls(packed, scale.squeeze(-1), offset.squeeze(-1), bits, axis, group, rank)

    @property
    def tokens(self) -> int:
        """How many tokens are stored."""
        return self.integers.shape[1] * (self.group if self.axis == "tokens" else 1)

    def read(self, tokens: int, dtype: torch.dtype) -> Tensor:
        """Return the first `tokens`, [batch, tokens, rank], as floats."""
        kept = -(-tokens // self.group) if self.axis == "tokens" else tokens
        stored, columns = self.integers[:, :kept], self.group if self.axis == "tokens" else self.rank
        signed = unpack(stored.reshape(-1, stored.shape[-1]), self.bits, columns)
        integers = signed.view(*stored.shape[:-1], columns).float() + (1 << (self.bits - 1))
        scale, offset = self.scale[:, :kept, :, None], self.offset[:, :kept, :, None]
        if self.axis == "tokens":
            return from_groups(floats_of(integers, scale, offset), self.axis, self.rank)[:, :tokens].to(dtype)
        groups = to_groups(integers, self.axis, self.group)
        return from_groups(floats_of(groups, scale, offset), self.axis, self.rank).to(dtype)

    def extended(self, later: PackedStates) -> PackedStates:
        """Return these states with later ones of the same rows behind them."""
        return self._with(
            torch.cat([self.integers, later.integers], dim=1),
            torch.cat([self.scale, later.scale], dim=1),
            torch.cat([self.offset, later.offset], dim=1),
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedStates:
        """Return these states with every tensor changed, as rows are chosen or repeated."""
        return self._with(change(self.integers), change(self.scale), change(self.offset))

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is stored."""
        yield from (self.integers, self.scale, self.offset)

    def _with(self, integers: Tensor, scale: Tensor, offset: Tensor) -> PackedStates:
        return PackedStates(integers, scale, offset, self.bits, self.axis, self.group, self.rank)
