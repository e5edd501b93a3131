"""How much faster a DiT-XL/2 with fewer blocks is: one forward, random weights, real width."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence

import torch
from _common import table
from _dit_xl import CONFIG, build, inputs
from compress.evaluation.speed import interleaved_minima
from compress.models.blocks import drop_blocks
from torch import nn

BLOCKS = "transformer_blocks"
_CLASS = {"_class_name": "DiTTransformer2DModel"}


def shallower(module: nn.Module, depth: int) -> nn.Module:
    """Return a model of evenly spaced blocks of another, the first among them; both share their tensors."""
    before = len(module.get_submodule(BLOCKS))
    if depth == before:
        return module
    left = copy.copy(module)
    left._modules = dict(module._modules)
    places = [index * before // depth for index in range(depth)]
    drop_blocks(left, {**CONFIG, **_CLASS, "num_layers": before}, {BLOCKS: places})
    return left


@torch.no_grad()
def measure(
    module: nn.Module, depths: Sequence[int], *, batch: int, rounds: int, seed: int
) -> dict[int, float]:
    """Return depth -> the least processor seconds of one forward.

    Args:
        module: a DiT of XL width, in float32.
        depths: its own first.
        batch: items of a forward, of 256 tokens each.
        rounds: see `interleaved_minima`.
        seed: of the inputs.
    """
    call = inputs(torch.float32, batch, seed)
    models = [shallower(module, depth) for depth in depths]
    calls = [lambda model=model: model(**call) for model in models]
    seconds = interleaved_minima(calls, rounds=rounds, warm_up=1, clock=time.process_time)
    return dict(zip(depths, seconds, strict=True))


def speed_table(depths: Sequence[int], *, batch: int, rounds: int, seed: int) -> Mapping[int, float]:
    """Print one table; return depth -> times as fast as the first of them."""
    module = build(depths[0], torch.float32, seed)
    seconds = measure(module, depths, batch=batch, rounds=rounds, seed=seed)
    ratios = {depth: seconds[depths[0]] / value for depth, value in seconds.items()}
    table(
        ["DiT-XL/2", "CPU s", "times as fast", "by depth alone"],
        [
            [f"D{depth}", f"{seconds[depth]:.2f}", f"{ratios[depth]:.2f}", f"{depths[0] / depth:.2f}"]
            for depth in depths
        ],
    )
    return ratios
