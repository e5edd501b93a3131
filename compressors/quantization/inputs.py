"""What a stage keeps of the calibration inputs: vectors, a few rows, and Gram matrices in portions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.base import Calibration
from ...calibration.seeds import generator_for
from ...calibration.statistics import ChannelAbsMax, Gram, RowSample
from ...errors import StageError
from ...models.base import OpenModel
from ...progress import Progress, step
from ...runtime.moe_names import expert_linear
from .scheme import Group

ROW_BUDGET_BYTES = 192 * 2**20
GRAM_BUDGET_BYTES = 512 * 2**20
_MOST_ROWS, _LEAST_ROWS = 512, 32
_SHARED_INPUT = (".q", ".k", ".v")


def sources_of(groups: Sequence[Group], roles: dict[str, str]) -> dict[str, str]:
    """Return layer -> the layer whose recorded input stands for its own.

    Query, key and value projections of one group read the same tensor; it is kept once, and so is what the
    gate and the up projection of an expert read. Other members of a group (the two output projections of a
    joint attention) share a scale, not an input.

    Args:
        groups: of layers that share a scale.
        roles: of all linears.
    """
    sources = {name: _gate_of(name) for name in roles}
    for group in groups:
        first: str | None = None
        for name in group.targets:
            if roles[name].endswith(_SHARED_INPUT):
                first = first or name
                sources[name] = first
    return sources


def _gate_of(name: str) -> str:
    """Return the gate that reads what an expert's up projection reads; of any other layer itself."""
    expert = expert_linear(name)
    return f"{expert[0]}.{expert[1]}.gate_proj" if expert and expert[2] == "up_proj" else name


def row_count(widths: Iterable[int]) -> int:
    """Return how many rows are kept of every source layer, by the widths of all of them."""
    return max(_LEAST_ROWS, min(_MOST_ROWS, ROW_BUDGET_BYTES // (4 * sum(widths))))


def row_bytes(names: Mapping[str, int]) -> int:
    """Return the bytes of the rows that are kept at most, of layers with these widths: the budget, mostly.

    Some rows are kept of every layer, however many there are: of thousands of experts that is more.
    """
    widths = [width for name, width in names.items() if _gate_of(name) == name]
    return max(ROW_BUDGET_BYTES, 4 * sum(widths) * row_count(widths)) if widths else ROW_BUDGET_BYTES


@dataclass(frozen=True)
class Inputs:
    """What was kept, by source layer.

    Attributes:
        maximum: [in] float32, the statistic of the channel scale.
        rows: [samples, in] float32.

    Experts that no token of the calibration met are in neither.
    """

    maximum: dict[str, Tensor]
    rows: dict[str, Tensor]

    def rows_of(self, source: str, width: int) -> Tensor:
        """Return what was kept of a source layer [samples, width]; none of an expert that no token met."""
        return self.rows[source] if source in self.rows else torch.zeros(0, width)


def gather(
    model: OpenModel,
    widths: dict[str, int],
    ranges: Sequence[tuple[int, int]],
    calibration: Calibration,
    progress: Progress,
    stored: Collection[str] = (),
) -> Inputs:
    """Replay the calibration once and keep vectors and a few rows per source layer.

    Args:
        model: as it came in.
        widths: source layer -> input channels.
        ranges: inclusive timestep ranges of v1's statistic; empty: maximum over all calls.
        calibration: to replay.
        progress: to report to.
        stored: layers that store their output for the first token, which does not count for them.

    Raises:
        StageError: a layer is never reached, or its inputs are not finite.
    """
    count = row_count(widths.values())
    rows = {name: RowSample(count, generator_for(calibration.seed, "rows", name)) for name in widths}
    maximum = {name: ChannelAbsMax(ranges) for name in widths}

    def observe(name: str, x: Tensor, timesteps: Tensor) -> None:
        x = x[:, 1:] if name in stored else x
        rows[name].update(x, timesteps)
        maximum[name].update(x, timesteps)

    with step(progress, "input statistics"):
        calibration.observe(model, list(widths), observe, progress)
    # Whatever else no call reaches is an error of `observe`.
    kept = {name: sink.rows.float() for name, sink in rows.items() if sink.seen}
    largest = {name: _statistic(maximum[name]) for name in kept}
    for name, value in largest.items():
        if not torch.isfinite(value).all():
            raise StageError(f"{name}: its calibration inputs are not finite", hint="check the calibration")
    return Inputs(largest, kept)


def _statistic(sink: ChannelAbsMax) -> Tensor:
    """Return v2's maximum, or v1's averages joined: one weight is stored, so by their maximum."""
    if not sink.ranges:
        return sink.floored()
    try:
        return sink.range_averages().amax(dim=0)
    except ValueError as error:
        raise StageError(
            f"timestep_ranges: {error}", hint="calibrate with more steps or widen the range"
        ) from None


def gather_grams(
    model: OpenModel,
    widths: dict[str, int],
    calibration: Calibration,
    progress: Progress,
    stored: Collection[str] = (),
) -> dict[str, Tensor]:
    """Replay the calibration once and return X^T X / rows, float32 [in, in], per source layer reached.

    The first token does not count for the layers in `stored`.
    """
    grams = {name: Gram() for name in widths}

    def observe(name: str, x: Tensor, timesteps: Tensor) -> None:
        grams[name].update(x[:, 1:] if name in stored else x, timesteps)

    with step(progress, "input correlations"):
        calibration.observe(model, list(widths), observe, progress)
    return {name: gram.mean() for name, gram in grams.items() if gram.rows}


def portions(blocks: Sequence[dict[str, int]]) -> Iterable[range]:
    """Split blocks (source layer -> width) into runs whose Gram matrices fit the budget together."""
    start, used = 0, 0
    for index, widths in enumerate(blocks):
        need = sum(4 * width * width for width in widths.values())
        if index > start and used + need > GRAM_BUDGET_BYTES:
            yield range(start, index)
            start, used = index, 0
        used += need
    if start < len(blocks):
        yield range(start, len(blocks))
