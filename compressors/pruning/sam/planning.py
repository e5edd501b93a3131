"""Predict slimming from the config: sizes after it, memory, and what the user should know before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from ....models.base import ModelSpec, flat_shapes
from ....models.sam_macs import encoder_macs
from ....recipes.slimsam import SlimSamSettings
from ...base import StagePlan
from ...recovery.best import COPIES_ON_DISK as BEST_COPIES
from ...recovery.state import COPIES_ON_DISK
from .choosing import Widths, kept_of, multiples, widths_after
from .cutting import planned_surgery
from .memory import (
    FLOAT32_BYTES,
    PhaseBytes,
    aligning_bytes,
    choice_bytes,
    encoder_elements,
    scoring_bytes,
)
from .sites import EncoderSites, encoder_sites

_MIB = 2**20


@dataclass(frozen=True)
class Slimmed:
    """The model before, between and after.

    Attributes:
        between: after the residual stream was cut; with `slimming: one_step` it never stands alone.
        after: with widths that are spread evenly over the layers.
        largest, smallest: what may come out where the data decide; `after` where they do not.
        before_widths, widths: of `before` and `after`.
    """

    before: ModelSpec
    between: ModelSpec
    after: ModelSpec
    largest: ModelSpec
    smallest: ModelSpec
    before_widths: Widths
    widths: Widths


def slim(spec: ModelSpec, settings: SlimSamSettings) -> Slimmed:
    """Predict sizes.

    Args:
        spec: of the model as the stage finds it.
        settings: of the stage.

    Raises:
        PlanError: the ratio leaves less than one unit per head, or than one multiple.
    """
    sites = encoder_sites(spec.meta_module())
    before = Widths.of(sites)
    widths = widths_after(before, sites.heads, settings)
    if settings.ranking == "global":
        widths = replace(widths, head_dims=_evenly(before.head_dims, settings.ratio))
    after = _cut(spec, widths)
    largest = smallest = after
    if settings.ranking == "global":
        first = sorted(range(len(sites.layers)), key=lambda layer: sites.layers[layer].window != 0)
        largest = _cut(spec, _extreme(before, widths, settings, sites, first, most=True))
        smallest = _cut(spec, _extreme(before, widths, settings, sites, first[::-1], most=False))
    return Slimmed(
        spec,
        _cut(spec, replace(before, embedding=widths.embedding)),
        after,
        largest,
        smallest,
        before,
        widths,
    )


def plan_slimming(spec: ModelSpec, settings: SlimSamSettings) -> StagePlan:
    """Predict the stage; no weights are read.

    Raises:
        PlanError: what is asked does not fit the model.
    """
    slimmed = slim(spec, settings)
    phases = phase_bytes(slimmed, settings)
    data_decide = settings.ranking == "global"
    return StagePlan(
        method=settings.method,
        before=spec.size(),
        after=slimmed.largest.size(),
        spec=slimmed.largest,
        peak_memory_bytes=max(phase.memory for phase in phases),
        notes=_notes(slimmed, settings, phases),
        disk_bytes=_disk_bytes(slimmed, settings),
        least=slimmed.smallest if data_decide else None,
    )


def phase_bytes(slimmed: Slimmed, settings: SlimSamSettings) -> list[PhaseBytes]:
    """Return what every phase takes at its worst moment."""
    before, between, after = slimmed.before, slimmed.between, slimmed.largest
    original = before.size().bytes
    kept = choice_bytes(before, settings)
    first = PhaseBytes("embedding pruning", scoring_bytes(before, settings, embedding=True, beside=0))
    if settings.slimming == "one_step":
        align = aligning_bytes(after, [before], "outputs", settings, beside=original + kept)
        return [replace(first, name="pruning"), PhaseBytes("aligning", align)]
    previous = between.dtype.itemsize * encoder_elements(between)
    return [
        first,
        PhaseBytes(
            "embedding aligning",
            aligning_bytes(between, [before], "embedding", settings, beside=original + kept),
        ),
        PhaseBytes(
            "bottleneck pruning",
            scoring_bytes(between, settings, embedding=False, beside=original + kept),
        ),
        PhaseBytes(
            "bottleneck aligning",
            aligning_bytes(
                after, [before, between], "bottleneck", settings, beside=original + kept + previous
            ),
        ),
    ]


def _cut(spec: ModelSpec, widths: Widths) -> ModelSpec:
    return spec.cut(planned_surgery(spec.config, widths.embedding, widths.head_dims, widths.inner))


def _extreme(
    before: Widths,
    widths: Widths,
    settings: SlimSamSettings,
    sites: EncoderSites,
    order: Sequence[int],
    *,
    most: bool,
) -> Widths:
    """Return the widths that cost most, or least: those layers keep their heads that come first in `order`.

    A channel of a head costs more in a layer that attends to the whole image; inner channels cost the same
    everywhere, so that only their sum matters.
    """
    of_heads, of_inner = multiples(sites.heads, settings)
    head_dims = _dealt(before.head_dims, settings.ratio, of_heads // sites.heads, order, most=most)
    more = 1 + of_inner if most else 0  # by rounding, in every layer at the most
    inner = tuple(max(1, min(size, kept_of(size, settings.ratio) + more)) for size in before.inner)
    return replace(widths, head_dims=head_dims, inner=inner)


def _evenly(sizes: Sequence[int], ratio: float) -> tuple[int, ...]:
    """Deal out what stays of a pool to its layers by their sizes; all of it, so that layers may differ."""
    ends = [0, *accumulate(sizes)]
    total = kept_of(ends[-1], ratio)
    upto = [total * end // ends[-1] for end in ends]
    return tuple(max(1, high - low) for low, high in pairwise(upto))


def _dealt(
    sizes: Sequence[int], ratio: float, multiple: int, order: Sequence[int], *, most: bool
) -> tuple[int, ...]:
    """Deal out what stays of a pool to its layers in an order; every layer keeps a multiple at least."""
    found = [min(multiple, size) for size in sizes]
    left = kept_of(sum(sizes), ratio) - sum(found)
    for layer in order:
        more = min(left, sizes[layer] - found[layer])
        found[layer] += more
        left -= more
    rounded_up = multiple if most else 0
    return tuple(min(size, count + rounded_up) for size, count in zip(sizes, found, strict=True))


def _disk_bytes(slimmed: Slimmed, settings: SlimSamSettings) -> int:
    """Return what the stage keeps meanwhile: the best weights of a finished aligning, and a state."""
    numbers = encoder_elements(slimmed.largest)
    between = encoder_elements(slimmed.between)
    sums = 2 * FLOAT32_BYTES * encoder_elements(slimmed.before)  # the old file stands until the new is whole
    aligned = FLOAT32_BYTES * (3 * COPIES_ON_DISK + BEST_COPIES)  # weights, moments; and the best weights
    if settings.slimming == "one_step":
        return max(sums, aligned * numbers)
    finished = FLOAT32_BYTES * between
    return max(sums, aligned * between, finished + aligned * numbers)


def _notes(slimmed: Slimmed, settings: SlimSamSettings, phases: Sequence[PhaseBytes]) -> list[str]:
    memory = ", ".join(f"{phase.name} {phase.memory / _MIB:,.0f}" for phase in phases)
    return [
        _widths_note(slimmed, settings),
        _work_note(slimmed),
        *(_global_notes(slimmed) if settings.ranking == "global" else ()),
        _course_note(settings),
        f"up to {settings.choice_images} images are not trained on; by them the weights are chosen that"
        " stay: by mIoU where they have masks, else by the error of the embedding",
        f"MiB of memory at the worst moment of each phase: {memory}",
    ]


def _widths_note(slimmed: Slimmed, settings: SlimSamSettings) -> str:
    before, after = slimmed.before_widths, slimmed.widths
    evenly = " if spread evenly" if settings.ranking == "global" else ""
    return (
        f"embedding {before.embedding} to {after.embedding} channels; heads"
        f" {_range(before.head_dims)} to {_range(after.head_dims)} channels each, as many heads as before;"
        f" feed-forward {_range(before.inner)} to {_range(after.inner)}{evenly}"
    )


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


def _work_note(slimmed: Slimmed) -> str:
    """Say the encoder's sizes, with work in both conventions."""
    before, after = slimmed.before, slimmed.after
    with_products, without = (
        [
            encoder_macs(one.config, flat_shapes(one.surgery), attention_products=products)
            for one in (before, after)
        ]
        for products in (True, False)
    )
    return (
        f"the encoder alone: {encoder_elements(before):,} to {encoder_elements(after):,} parameters;"
        f" {_work(with_products)} multiply-accumulates with attention products,"
        f" {_work(without)} in linears and convolutions, as the paper counts"
    )


def _work(pair: Sequence[int]) -> str:
    """Return "before to after" in billions; of small models in millions."""
    unit, letter = (1e9, "G") if min(pair) >= 1e9 else (1e6, "M")
    return f"{pair[0] / unit:,.1f} to {pair[1] / unit:,.1f} {letter}"


def _global_notes(slimmed: Slimmed) -> list[str]:
    low, high = slimmed.smallest.parameters, slimmed.largest.parameters
    return [
        "which layers lose how much depends on the data: at the least"
        f" {low:,} parameters stay, at the most {high:,}, and {slimmed.after.parameters:,} if it is spread"
        " evenly",
        "ranking global leaves layers of different widths: only compress loads the result",
    ]


def _course_note(settings: SlimSamSettings) -> str:
    steps, epochs = settings.length
    if settings.slimming == "one_step":
        long = f"{2 * steps} steps" if steps is not None else f"{2 * (epochs or 0):g} epochs"
        return f"slimming one_step is a baseline: all is pruned at once and aligned for {long}"
    long = f"{steps} steps" if steps is not None else f"{epochs:g} epochs"
    turns = f"pruned and aligned in turns, {long} in batches of {settings.batch_size} images each"
    return turns if settings.features else f"{turns}; features: false is a baseline"
