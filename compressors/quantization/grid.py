"""Integer grids of weights: W^ = (q + z) D, one D and z per output channel or group of inputs.

Asymmetric (arXiv 2406.02540): mx = max(max W, 0), mn = min(min W, 0), D = (mx - mn) / (2^b - 1),
z = round(mn / D) + 2^(b-1), q = clip(round(W / D) - z, -2^(b-1), 2^(b-1) - 1).
Symmetric: D = max|W| / (2^(b-1) - 1), z = 0. `mse` shrinks the range by the factor that gives the
least squared error; it goes beyond the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Clip = Literal["minmax", "mse"]
_CHUNK_ELEMENTS = 2**22
_COARSE, _FINE = 14, 4
# The narrowest range worth trying, as a share of min-max: the fewer the levels, the more clipping pays.
_NARROWEST = {2: 0.2, 3: 0.35, 4: 0.5, 6: 0.7, 8: 0.85}
_RESCALED = (0.5, 2.0)
_SMALLEST = {torch.float32: 1e-30, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Grid:
    """How the weights of a layer are rounded.

    Attributes:
        bits: of one weight.
        symmetric: no zero point.
        clip: how the range is found.
        group_size: input channels per scale; None is one scale per output channel.
    """

    bits: int
    symmetric: bool
    clip: Clip
    group_size: int | None = None

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest stored integer."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype in which scales are stored; many small groups take half precision."""
        return torch.float16 if self.group_size else torch.float32

    @property
    def zero_dtype(self) -> torch.dtype:
        """Dtype in which zero points are stored: at 8 bits they reach 128."""
        return torch.int16 if self.bits == 8 else torch.int8


class Steps(NamedTuple):
    """The grid of one weight: `scale` [out, groups] as stored, `zero` integer [out, groups] or None."""

    scale: Tensor
    zero: Tensor | None


class QuantizedWeight(NamedTuple):
    """Integers int8 [out, in] and the grid they live on."""

    q: Tensor
    steps: Steps


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float64 scales for storage; half precision is rounded up, so that nothing is clipped."""
    stored = scale.to(dtype)
    if dtype == torch.float16:
        above = torch.nextafter(stored, torch.full_like(stored, torch.inf))
        stored = torch.where(stored.double() < scale, above, stored)
    return stored.clamp_min(_SMALLEST[dtype])


def _steps(low: Tensor, high: Tensor, grid: Grid) -> Steps:
    """Return the steps of ranges [low, high] (float64, low <= 0 <= high)."""
    bottom, top = grid.bounds
    if grid.symmetric:
        return Steps(_stored(torch.maximum(high, -low) / top, grid.scale_dtype), None)
    scale = _stored((high - low) / (top - bottom), grid.scale_dtype)
    zero = torch.round(low / scale.double()) - bottom
    return Steps(scale, zero.clamp(bottom + 1, -bottom).to(grid.zero_dtype))


def _levels(weight: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """Return the integers of weight [..., width] under steps [...], as floats."""
    bottom, top = grid.bounds
    level = torch.round(weight / steps.scale.float().unsqueeze(-1))
    if steps.zero is not None:
        level -= steps.zero.float().unsqueeze(-1)
    return level.clamp_(bottom, top)


def _values(level: Tensor, steps: Steps) -> Tensor:
    """Return (q + z) D for integers [..., width] given as floats; overwrites `level`."""
    if steps.zero is not None:
        level += steps.zero.float().unsqueeze(-1)
    return level.mul_(steps.scale.float().unsqueeze(-1))


def _chunks(weight: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """View weight [out, in] as [out, groups, width], in runs of rows that bound the working memory."""
    width = grid.group_size or weight.shape[1]
    rows = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    return weight.view(weight.shape[0], -1, width).split(rows)


def _error(chunk: Tensor, steps: Steps, grid: Grid, importance: Tensor | None) -> Tensor:
    """Return the squared error per group: [rows, groups]."""
    error = _values(_levels(chunk, steps, grid), steps).sub_(chunk).square_()
    if importance is not None:
        error *= importance
    return error.sum(dim=-1)


def _narrow(chunk: Tensor, full: Callable[[Tensor], Steps], grid: Grid, importance: Tensor | None) -> Tensor:
    """Search the share of the range, float64 [rows, groups], that gives the least error."""
    lowest = _NARROWEST[grid.bits]
    gap = (1.0 - lowest) / _COARSE
    best = torch.ones(chunk.shape[:-1], dtype=torch.float64, device=chunk.device)
    least = _error(chunk, full(best), grid, importance)

    def consider(share: Tensor) -> None:
        nonlocal best, least
        error = _error(chunk, full(share), grid, importance)
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)

    for index in range(1, _COARSE + 1):
        consider(torch.full_like(best, 1.0 - gap * index))
    centre = best
    for index in range(1, _FINE + 1):
        offset = gap * index / (_FINE + 1)
        consider((centre - offset).clamp(max=1.0))
        consider((centre + offset).clamp(max=1.0))
    return best


def find_steps(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Steps:
    """Choose the grid of a weight.

    Args:
        weight: float32 [out, in]; `group_size` divides `in`.
        grid: bits, symmetry, clipping, groups.
        importance: [in], how much a squared error in an input channel counts (`mse` only).

    Returns:
        scale [out, groups] and zero [out, groups] (None where symmetric), in their stored dtypes.
    """
    width = grid.group_size or weight.shape[1]
    weights = None if importance is None else importance.view(-1, width)
    found: list[Steps] = []
    for chunk in _chunks(weight, grid):
        low = chunk.amin(dim=-1).double().clamp_max(0)
        high = chunk.amax(dim=-1).double().clamp_min(0)

        def full(share: Tensor, low: Tensor = low, high: Tensor = high) -> Steps:
            return _steps(low * share, high * share, grid)

        share = torch.ones_like(low)
        if grid.clip == "mse":
            share = _narrow(chunk, full, grid, weights)
        found.append(full(share))
    zero = None if grid.symmetric else torch.cat([item.zero for item in found if item.zero is not None])
    return Steps(torch.cat([item.scale for item in found]), zero)


def round_to_nearest(weight: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """Round weight [out, in] to its grid: int8 [out, in]."""
    width = grid.group_size or weight.shape[1]
    level = _levels(weight.view(weight.shape[0], -1, width), steps, grid)
    return level.to(torch.int8).view(weight.shape)


def rescaled(weight: Tensor, rounded: QuantizedWeight, grid: Grid, gram: Tensor | None = None) -> Steps:
    """Return the steps with scales at which the rounded weight is as long along the original as that is.

    A clipped range shrinks a weight, and layers that all shrink err in one direction, so that their
    errors add up in amplitude instead of power. With <w, v> = w G v^T, G the Gram matrix of the inputs or
    the identity, the scale is multiplied by <w, w> / <w, w^>. This goes beyond the papers.

    Args:
        weight: float32 [out, in].
        rounded: of it.
        grid: of the rounding.
        gram: float32 [in, in]; with it there is one factor per output channel, else one per scale.
    """
    groups = rounded.steps.scale.shape[1]
    seen = weight if gram is None else weight @ gram
    parts = [(seen * item).double() for item in (weight, dequantize(rounded))]
    shape = (len(weight), groups, -1) if gram is None else (len(weight), 1, -1)
    whole, found = (part.view(shape).sum(dim=-1) for part in parts)
    # A weight of zeros, or one whose rounding points elsewhere, keeps its scale.
    usable = (found > 0) & (whole > 0)
    factor = torch.where(usable, whole / torch.where(usable, found, 1.0), 1.0).clamp(*_RESCALED)
    scale = (rounded.steps.scale.double() * factor).to(grid.scale_dtype)
    return rounded.steps._replace(scale=scale.clamp_min(_SMALLEST[grid.scale_dtype]))


def quantize(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> QuantizedWeight:
    """Find the grid of weight float32 [out, in] and round to it, once."""
    steps = find_steps(weight, grid, importance)
    return QuantizedWeight(round_to_nearest(weight, steps, grid), steps)


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """Return (q + z) D: float32 [out, in]."""
    groups = quantized.steps.scale.shape[1]
    level = quantized.q.float().view(quantized.q.shape[0], groups, -1)
    return _values(level, quantized.steps).view(quantized.q.shape)
