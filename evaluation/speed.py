"""How long one forward takes, original and compressed measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..models.base import OpenModel


def interleaved_minima(
    calls: Sequence[Callable[[], object]],
    *,
    rounds: int = 7,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the shortest time of each call in seconds.

    The calls take turns, so that a slow phase of a shared machine meets all of them; the minimum is
    what the code takes when nothing else runs.

    Args:
        calls: what to time; each must have finished its work when it returns.
        rounds: how often each is timed.
        warm_up: untimed rounds before.
        clock: returns seconds. Where the machine is shared for the whole time, the wall's favour short
            calls, which fit between what others do; `time.process_time` does not.
    """
    best = [float("inf")] * len(calls)
    for round_ in range(warm_up + rounds):
        for index, call in enumerate(calls):
            started = clock()
            call()
            if round_ >= warm_up:
                best[index] = min(best[index], clock() - started)
    return best


@torch.no_grad()
def forward_latency(
    original: OpenModel,
    compressed: nn.Module,
    *,
    batch: int = 2,
    rounds: int = 7,
    seed: int = 0,
    synchronize: Callable[[], None] = lambda: None,
) -> Mapping[str, float]:
    """Time one forward of the original and of the compressed module on equal inputs.

    Args:
        original: gives the family's reference input.
        compressed: a module of the same interface, on the same device.
        batch: items per forward.
        rounds: see `interleaved_minima`.
        seed: of the random input.
        synchronize: waits for the device; `torch.cuda.synchronize` on a GPU.

    Returns:
        ``original_seconds``, ``compressed_seconds`` and ``speedup`` (above 1: compressed is faster).
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = original.family.example_inputs(original.module, batch, generator)

    def run(module: nn.Module) -> None:
        module(**inputs)
        synchronize()

    before, after = interleaved_minima([lambda: run(original.module), lambda: run(compressed)], rounds=rounds)
    return {"original_seconds": before, "compressed_seconds": after, "speedup": before / after}
