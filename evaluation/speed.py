"""How long one forward takes, original and compressed measured in turn.

Of a model that segments the encoder is timed as well: it is what is compressed, and it runs once an image,
however many masks are asked for.

What was measured belongs to a machine and a moment: it is reported, but no second run gives it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.base import OpenModel
from ..progress import Progress, step
from ..recipes.schema import SpeedSettings
from ..runtime.cpu import processor

_FIGURES = ("original_seconds", "seconds", "speedup")
_ENCODER, _PIXELS = "vision_encoder", "pixel_values"


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
        ``original_seconds``, ``seconds`` of the compressed one, and ``speedup`` (above 1: it is faster).
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = original.family.example_inputs(original.module, batch, generator)
    return _compared(original.module, compressed, inputs, rounds, synchronize)


@torch.no_grad()
def encoder_latency(
    original: OpenModel,
    compressed: nn.Module,
    *,
    batch: int,
    rounds: int,
    seed: int,
    synchronize: Callable[[], None],
) -> Mapping[str, float]:
    """Time the image encoders of two models that segment; arguments and result as of `forward_latency`."""
    generator = torch.Generator().manual_seed(seed)
    inputs = original.family.example_inputs(original.module, batch, generator)
    before, after = (module.get_submodule(_ENCODER) for module in (original.module, compressed))
    return _compared(before, after, {_PIXELS: inputs[_PIXELS]}, rounds, synchronize)


def _compared(
    original: nn.Module,
    compressed: nn.Module,
    inputs: Mapping[str, Any],
    rounds: int,
    synchronize: Callable[[], None],
) -> dict[str, float]:
    def run(module: nn.Module) -> None:
        module(**inputs)
        synchronize()

    before, after = interleaved_minima([lambda: run(original), lambda: run(compressed)], rounds=rounds)
    return {"original_seconds": before, "seconds": after, "speedup": before / after}


def measure_speed(
    original: OpenModel, module: nn.Module, settings: SpeedSettings, seed: int, progress: Progress
) -> dict[str, Any]:
    """Return the report's `evaluation.speed`: settings, where, and what `forward_latency` says.

    Of a model that segments, `encoder` holds what `encoder_latency` says.

    Args:
        original: before any stage, on the device of the other.
        module: what was made of it.
        settings: how to measure.
        seed: of the random input.
        progress: of the run.
    """
    device = next(original.module.parameters()).device

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    how: dict[str, Any] = {
        "batch": settings.batch_size, "rounds": settings.rounds, "seed": seed, "synchronize": synchronize
    }  # fmt: skip
    with step(progress, "speed of one forward"):
        figures: dict[str, Any] = _rounded(forward_latency(original, module, **how))
        if original.family.task == "segment":
            figures["encoder"] = _rounded(encoder_latency(original, module, **how))
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()[0]
    return {**settings.model_dump(mode="json"), "on": on, "threads": torch.get_num_threads(), **figures}


def _rounded(found: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{found[name]:.4g}") for name in _FIGURES}


def recorded_speed(evaluation: Any) -> dict[str, Any] | None:
    """Return what an earlier run's report says of speed; None where it says nothing that is usable.

    Args:
        evaluation: the report's `evaluation`, as read.
    """
    found = evaluation.get("speed") if isinstance(evaluation, dict) else None
    if not isinstance(found, dict):
        return None
    told = {name: value for name, value in found.items() if name != "encoder"}
    encoder = found.get("encoder", dict.fromkeys(_FIGURES, 1.0))
    if set(told) != {*SpeedSettings.model_fields, "on", "threads", *_FIGURES}:
        return None
    if not isinstance(encoder, dict) or set(encoder) != set(_FIGURES):
        return None
    numbers = [*(value for name, value in told.items() if name != "on"), *encoder.values()]
    usable = all(isinstance(value, int | float) and value > 0 for value in numbers)
    return found if usable and isinstance(found["on"], str) else None
