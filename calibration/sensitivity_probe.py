"""Measuring one layer at a time: the model computes with it as if quantized, and outputs are compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StageError
from ..models.base import OpenModel
from .sampler import place
from .sensitivity_calls import Calls
from .sensitivity_table import Kind, Metric, Place, Row
from .similarity import decibels, powers, ssim
from .suffix import Kept, SuffixRunner

KEPT_LIMIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Candidate:
    """One way to quantize a layer's weight or its input.

    Attributes:
        kind: which of the two.
        label: as "w4"; unique among the candidates of a layer and kind.
        bits: for the table.
        settings: what else decides (group size, clipping, ...): JSON values.
    """

    kind: Kind
    label: str
    bits: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """A layer and what to measure of it.

    Attributes:
        layer: dotted name of an `nn.Linear` or `nn.Conv2d`.
        candidates: to try, one after the other.
        metric: `sqnr_db` for quality, `ssim` for content.
        together: names of layers that take every candidate together, the layer's own among them; empty: it
            alone.
    """

    layer: str
    candidates: tuple[Candidate, ...]
    metric: Metric = "sqnr_db"
    together: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that compute as if quantized while one candidate is measured."""
        return self.together or (self.layer,)


Layer = nn.Linear | nn.Conv2d

Quantizer = Callable[[str, Layer, Candidate], AbstractContextManager[Any]]
"""Called as quantizer(name, layer, candidate): within the context this one layer computes as if
quantized; afterwards it is what it was, bit for bit. It may give the layer another weight (a new
parameter, never writing into the old one, which may be shared), hooks, or a `forward` of its own."""


@dataclass(frozen=True)
class Plan:
    """What a process measures on and with; picklable where several do.

    Attributes:
        calls: recorded ones; read once.
        layers: names of the layers that will be measured.
        quantizer: makes a layer compute as if quantized.
        dtype: that the model computes in; None: as it is.
        kept_limit_bytes: of block outputs; what needs more is measured in portions of the calls, one
            call at the least.
    """

    calls: Calls
    layers: tuple[str, ...]
    quantizer: Quantizer
    dtype: torch.dtype | None = None
    kept_limit_bytes: int = KEPT_LIMIT_BYTES


@dataclass(frozen=True)
class Job:
    """Candidates of layers that are reached from the same block on; measured together.

    Attributes:
        entry: the first block that computes.
        items: to measure, in order.
    """

    entry: int
    items: tuple[tuple[Target, Candidate], ...]


Announce = Callable[[str, Candidate], None]


class Probe:
    """A model with its recorded calls, ready to measure candidates.

    Holds the calls and the original's outputs in memory (latents and text embeddings), the outputs of
    skipped blocks up to a limit, and a copy of one layer's weight.

    Args:
        model: in evaluation mode; a layer at a time is changed and restored.
        plan: what to measure on and with.

    Raises:
        StageError: there are no calls, the original's output is not finite or zero, or a layer is not
            there, neither linear nor a convolution, or never reached.
    """

    def __init__(self, model: OpenModel, plan: Plan) -> None:
        self._quantizer, self._limit, self._seed = plan.quantizer, plan.kept_limit_bytes, plan.calls.seed
        self._calls = [place(call, model.module) for call in plan.calls]
        if not self._calls:
            raise StageError("there are no recorded calls to measure sensitivities on")
        blocks = [block for _, block in model.family.blocks(model.module)]
        self.runner = SuffixRunner(model.module, blocks, self._calls[0], plan.layers)
        self._layers = {name: _layer(model.module, name) for name in plan.layers}
        self._references = [self.runner.run(call, Kept(0)) for call in self._calls]
        self._check_references()
        low = min(float(output.min()) for output in self._references)
        high = max(float(output.max()) for output in self._references)
        self._data_range = high - low

    @property
    def calls(self) -> int:
        """How many calls are measured on."""
        return len(self._calls)

    def jobs(self, targets: Sequence[Target], done: Mapping[Place, Row], parts: int = 1) -> list[Job]:
        """Return what is to be measured, the longest runs first.

        Args:
            targets: layers and candidates.
            done: rows that are there already.
            parts: cut jobs so that each is at most this fraction of all rows.
        """
        by_entry: dict[int, list[tuple[Target, Candidate]]] = {}
        for target in targets:
            for candidate in target.candidates:
                if (candidate.kind, target.layer, candidate.label) not in done:
                    entry = min(self.runner.entries[layer] for layer in target.layers)
                    by_entry.setdefault(entry, []).append((target, candidate))
        most = max(1, -(-sum(map(len, by_entry.values())) // parts))
        return [
            Job(entry, tuple(items[start : start + most]))
            for entry, items in sorted(by_entry.items())
            for start in range(0, len(items), most)
        ]

    def measure(self, job: Job, announce: Announce | None = None) -> Iterator[Row]:
        """Measure a job and yield its rows, each as soon as it is known.

        Args:
            job: of `jobs`.
            announce: called with layer and candidate before each is worked on.

        Raises:
            StageError: an output is not finite, or the quantizer did not restore a layer.
        """
        for target, _ in job.items:
            if target.metric == "ssim" and self._references[0].ndim != 4:
                raise StageError(f"{target.layer}: ssim compares images, and the model's output is none")
        tallies = [_Tally(target.metric) for target, _ in job.items]
        for indices, kept in self._portions(job.entry):
            for tally, (target, candidate) in zip(tallies, job.items, strict=True):
                if announce is not None:
                    announce(target.layer, candidate)
                self._add(tally, target, candidate, indices, kept)
                if indices[-1] == len(self._calls) - 1:
                    yield tally.row(target, candidate, self._seed)

    def _portions(self, entry: int) -> Iterator[tuple[list[int], list[Kept]]]:
        """Yield the indices of some calls and what is kept of them, within the limit."""
        indices: list[int] = []
        kept: list[Kept] = []
        for index, call in enumerate(self._calls):
            indices.append(index)
            kept.append(self.runner.keep(call, entry))
            used = sum(item.bytes for item in kept)
            # The next one is taken to be as large as the last one.
            if index == len(self._calls) - 1 or used + kept[-1].bytes > self._limit:
                yield indices, kept
                indices, kept = [], []

    @torch.no_grad()
    def _add(
        self,
        tally: _Tally,
        target: Target,
        candidate: Candidate,
        indices: Sequence[int],
        kept: Sequence[Kept],
    ) -> None:
        start = time.perf_counter()
        with ExitStack() as stack:
            for name in target.layers:
                layer = self._layers[name]
                stack.enter_context(_restored(name, layer))
                stack.enter_context(self._quantizer(name, layer, candidate))
            for index, item in zip(indices, kept, strict=True):
                output = self.runner.run(self._calls[index], item)
                if not torch.isfinite(output).all():
                    raise StageError(
                        f"{target.layer}: with its {candidate.kind} at {candidate.bits} bits"
                        f" ({candidate.label}) the model's output is not finite",
                        hint="leave the layer in floating point, or take this candidate out",
                    )
                tally.add(self._references[index], output, self._data_range)
        tally.seconds += time.perf_counter() - start

    def _check_references(self) -> None:
        for index, output in enumerate(self._references):
            if not torch.isfinite(output).all():
                raise StageError(f"recorded call {index}: the original model's output is not finite")
        if not any(output.any() for output in self._references):
            raise StageError(
                "the original model answers zero in every recorded call: nothing to compare with"
            )


@dataclass
class _Tally:
    """Sums over calls; in double precision and in the order of the calls, however they are portioned."""

    metric: Metric
    signal: float = 0.0
    noise: float = 0.0
    similarity: float = 0.0
    images: int = 0
    seconds: float = 0.0

    def add(self, reference: Tensor, output: Tensor, data_range: float) -> None:
        """Compare one call's outputs."""
        if self.metric == "ssim":
            self.similarity += ssim(reference, output, data_range) * len(reference)
            self.images += len(reference)
            return
        signal, noise = powers(reference, output)
        self.signal += signal
        self.noise += noise

    def row(self, target: Target, candidate: Candidate, seed: int) -> Row:
        """Return the finished row."""
        if self.metric == "ssim":
            value = self.similarity / self.images
            loss = 1.0 - value
        else:
            value, loss = decibels(self.signal, self.noise), self.noise / self.signal
        if not (math.isfinite(value) and math.isfinite(loss)):
            raise StageError(
                f"{target.layer}: {candidate.kind} at {candidate.bits} bits ({candidate.label}) has the"
                f" {self.metric} {value}"
            )
        return Row(
            candidate.kind, target.layer, candidate.label, candidate.bits, self.metric, value, loss,
            round(self.seconds, 4), seed,
        )  # fmt: skip


@contextmanager
def _restored(name: str, layer: Layer) -> Iterator[None]:
    """See to it that a layer comes back as it was."""

    def state() -> tuple[Any, ...]:
        hooks = (layer._forward_pre_hooks, layer._forward_hooks)
        held = [value for group in (layer._parameters, layer._buffers) for value in group.values()]
        return type(layer), "forward" in layer.__dict__, *(tuple(group) for group in hooks), *map(id, held)

    before, values = state(), [item.clone() for item in layer.parameters(recurse=False)]
    yield
    same = state() == before and all(
        torch.equal(item, value) for item, value in zip(layer.parameters(recurse=False), values, strict=True)
    )
    if not same:
        raise StageError(f"{name}: the quantizer did not restore the layer")


def _layer(module: nn.Module, name: str) -> Layer:
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        kind = type(layer).__name__
        raise StageError(f"{name}: a {kind}, not a linear layer or convolution in floating point")
    return layer
