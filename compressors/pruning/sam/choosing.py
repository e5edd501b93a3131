"""How many channels stay, and which: uniform widths, or layers that compete (arXiv 2312.05284, section 3.3).

Counts: int(n * (1 - ratio)), taken exactly, and rounded down to a multiple. The residual stream and the
channels of all heads together are multiples of the number of heads whatever `round_to` says (of the least
common multiple of both): heads lose channels alike, and the stock class splits the width of the residual
stream into its heads. So at one ratio both end equally wide where they began so, as the stock class wants it.

Global: the scores of all layers are normalized layer by layer and pooled, heads and inner channels apart;
the best int(n * (1 - ratio)) of a pool stay. What a layer keeps is then rounded up to a multiple, by its
next best channels: the official code spares those of the highest index. No layer falls to nothing.

A normalizer divides by a deviation to which 1e-8 is added; here that is a share of the layer's mean score,
so that the choice depends neither on the noise of the scores nor on the scale of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor, lcm

import torch
from torch import Tensor

from ....errors import PlanError, StageError
from ....recipes.slimsam import Normalizer, SlimSamSettings
from .scores import Scores
from .sites import EncoderSites

_EPSILON = 1e-8


@dataclass(frozen=True)
class Widths:
    """Sizes of an encoder.

    Attributes:
        embedding: channels of the residual stream.
        head_dims: channels of a head, per layer.
        inner: channels inside the feed-forward network, per layer.
    """

    embedding: int
    head_dims: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def of(cls, sites: EncoderSites) -> Widths:
        """Return the sizes as they are now."""
        layers = sites.layers
        return cls(
            sites.width, tuple(layer.head_dim for layer in layers), tuple(layer.inner for layer in layers)
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """The channels that stay, as ascending int64 indices on the CPU.

    Attributes:
        embedding: of the residual stream; None: it is not cut.
        attention: per layer, within every head alike; empty: the bottleneck is not cut.
        inner: per layer, of the feed-forward network; empty likewise.
    """

    embedding: Tensor | None
    attention: tuple[Tensor, ...]
    inner: tuple[Tensor, ...]


def widths_after(before: Widths, heads: int, settings: SlimSamSettings) -> Widths:
    """Return the sizes that a stage leaves: exact for uniform; for global as if layers competed to a tie.

    Args:
        before: sizes before the stage.
        heads: of every layer.
        settings: `ratio`, `round_to`, `ranking`.

    Raises:
        PlanError: the ratio leaves less than one unit per head, or than one multiple.
    """
    return _bottleneck_after(
        replace(before, embedding=_embedding_after(before, heads, settings)), heads, settings
    )


def _embedding_after(before: Widths, heads: int, settings: SlimSamSettings) -> int:
    return kept_width(
        before.embedding, settings.ratio, multiples(heads, settings)[0], what="the residual stream"
    )


def _bottleneck_after(before: Widths, heads: int, settings: SlimSamSettings) -> Widths:
    """Return the sizes with those of the bottleneck changed; the residual stream stays."""
    of_heads, of_inner = multiples(heads, settings)
    if settings.ranking == "global":
        one = of_heads // heads
        check_pool(before.head_dims, settings.ratio, one, what="heads")
        check_pool(before.inner, settings.ratio, of_inner, what="feed-forward networks")
        return Widths(
            before.embedding,
            tuple(_rounded(kept_of(size, settings.ratio), size, one) for size in before.head_dims),
            tuple(_rounded(kept_of(size, settings.ratio), size, of_inner) for size in before.inner),
        )
    head_dims = tuple(
        kept_width(size * heads, settings.ratio, of_heads, what=f"layer {layer}: its {heads} heads") // heads
        for layer, size in enumerate(before.head_dims)
    )
    inner = tuple(
        kept_width(size, settings.ratio, of_inner, what=f"layer {layer}: its feed-forward network")
        for layer, size in enumerate(before.inner)
    )
    return Widths(before.embedding, head_dims, inner)


def kept_of(count: int, ratio: float) -> int:
    """Return int(count * (1 - ratio)), with the ratio as it is written: 10 at 0.9 leave 1, not 0."""
    return floor(count * (1 - Fraction(repr(ratio))))


def kept_width(width: int, ratio: float, multiple: int, *, what: str) -> int:
    """Return the width that stays of one: rounded down to a multiple.

    Args:
        width: channels now.
        ratio: removed share, 0-1.
        multiple: of which the result is one.
        what: has the width, for the message.

    Raises:
        PlanError: not a single multiple stays.
    """
    left = kept_of(width, ratio)
    kept = left // multiple * multiple
    if not kept:
        raise PlanError(
            f"{what}: of {width} channels a ratio of {ratio} leaves {left}, and widths are multiples of"
            f" {multiple}",
            hint=_ratio_hint(multiple, width),
        )
    return kept


def check_pool(sizes: Sequence[int], ratio: float, multiple: int, *, what: str) -> None:
    """Refuse a ratio at which a pool keeps less than every layer has to.

    Args:
        sizes: channels that compete, per layer.
        ratio: removed share of the pool, 0-1.
        multiple: least that a layer keeps, and what its widths are multiples of.
        what: competes, for the message.

    Raises:
        PlanError: naming the largest ratio that works.
    """
    total = sum(sizes)
    left, least = kept_of(total, ratio), sum(min(multiple, size) for size in sizes)
    if left < least:
        raise PlanError(
            f"{what}: of the {total} channels of {len(sizes)} layers a ratio of {ratio} leaves {left}, and"
            f" every layer keeps {multiple} at least",
            hint=_ratio_hint(least, total),
        )


def choose(scores: Scores, sites: EncoderSites, settings: SlimSamSettings) -> Kept:
    """Choose what stays of everything that was scored.

    Where scores are equal, the lower index stays, and the earlier layer.

    Args:
        scores: of the encoder as it is now.
        sites: of the same encoder.
        settings: `ratio`, `round_to`, `ranking`, `normalizer`.

    Raises:
        PlanError: see `widths_after`.
        StageError: a score is not finite.
    """
    before, embedding = Widths.of(sites), None
    if scores.embedding is not None:
        embedding = best(scores.embedding, _embedding_after(before, sites.heads, settings))
    if not scores.attention:
        return Kept(embedding, (), ())
    # In the second phase the stream is narrow already, and the ratio is not asked of it again.
    widths = _bottleneck_after(before, sites.heads, settings)
    head_dims, inner = widths.head_dims, widths.inner
    if settings.ranking == "global":
        of_heads, of_inner = multiples(sites.heads, settings)
        one = of_heads // sites.heads
        head_dims = compete(scores.attention, settings.ratio, one, settings.normalizer)
        inner = compete(scores.inner, settings.ratio, of_inner, settings.normalizer)
    return Kept(embedding, _best_of_each(scores.attention, head_dims), _best_of_each(scores.inner, inner))


def best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the highest scores, [count] int64, ascending; of equal ones the lower.

    Args:
        scores: [n] float.
        count: 1 to n.

    Raises:
        StageError: a score is not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise StageError("a score of a channel is not finite, so channels cannot be ranked")
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def compete(scores: Sequence[Tensor], ratio: float, multiple: int, normalizer: Normalizer) -> tuple[int, ...]:
    """Return how much every layer keeps when the channels of all layers compete.

    Args:
        scores: per layer, [n] float64, not negative.
        ratio: removed share of all channels, 0-1; more stays by what rounding adds, less than a multiple a
            layer.
        multiple: what widths are rounded up to; a layer that is no wider than that stays whole.
        normalizer: applied to the scores of each layer.

    Raises:
        StageError: a score is not finite.
    """
    sizes = [len(values) for values in scores]
    pooled = torch.cat([normalized(values, normalizer) for values in scores])
    staying = torch.zeros(len(pooled), dtype=torch.bool)
    staying[best(pooled, kept_of(len(pooled), ratio))] = True
    counts = [int(part.sum()) for part in staying.split(sizes)]
    return tuple(_rounded(count, size, multiple) for count, size in zip(counts, sizes, strict=True))


def normalized(scores: Tensor, normalizer: Normalizer) -> Tensor:
    """Bring the scores of one layer to the scale of the others.

    Args:
        scores: [n] float64, not negative.
        normalizer: see `SlimSamSettings.normalizer`.

    Returns:
        [n] float64; unchanged by a common factor of all scores. All 0 where a layer has no score above 0.
    """
    shift, scale = _NORMALIZERS[normalizer](scores)
    if normalizer == "gaussian":
        scale = scale + _EPSILON * scores.mean()
    return (scores - shift) / scale if float(scale) > 0 else torch.zeros_like(scores)


_ZERO = torch.zeros((), dtype=torch.float64)
_NORMALIZERS: Mapping[Normalizer, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    # Layers of one channel have no deviation from each other, so it is that of all, not of a sample.
    "gaussian": lambda scores: (scores.mean(), scores.std(correction=0)),
    "mean": lambda scores: (_ZERO, scores.mean()),
    "max": lambda scores: (_ZERO, scores.max()),
    "sum": lambda scores: (_ZERO, scores.sum()),
    "min_max": lambda scores: (scores.min(), scores.max() - scores.min()),
}
"""Name -> what is subtracted, and what is divided by."""


def multiples(heads: int, settings: SlimSamSettings) -> tuple[int, int]:
    """Return what the widths of the residual stream and of all heads, and inner widths, are multiples of."""
    wanted = settings.round_to or heads
    return lcm(wanted, heads), wanted


def _rounded(count: int, size: int, multiple: int) -> int:
    return min(size, max(1, -(-count // multiple)) * multiple)


def _best_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(best(values, count) for values, count in zip(scores, counts, strict=True))


def _ratio_hint(least: int, width: int) -> str:
    digits = 10_000
    largest = floor((1 - Fraction(least, width)) * digits) / digits if least < width else 0.0
    if largest <= 0:
        return "no ratio leaves that much; set `round_to` to a smaller number"
    return f"take a ratio of at most {largest:g}"
