"""Low-rank changes of the linear layers of a model (arXiv 2106.09685), as long as a context is open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import sqrt

import torch
from torch import Tensor, nn

from ...calibration.seeds import generator_for

DOWN, UP = "low_rank_down", "low_rank_up"
_READ_ALONE = ("HunyuanDiTAttentionPool",)
"""Modules that read the weights of their linear layers and call none, so nothing can be added to these."""


@contextmanager
def low_rank(
    module: nn.Module, *, rank: int, alpha: float | None, seed: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Add (alpha / rank) * up(down(x)) to what every linear layer computes; `up` is zero at first.

    The layers stay the same objects, with the same weights; the two matrices are parameters of theirs
    meanwhile, and are gone afterwards.

    Args:
        module: of which all `nn.Linear` that are called are changed; one under several names once.
        rank: of the changes.
        alpha: None: twice the rank.
        seed: of the matrices `down`.

    Returns:
        Name -> parameter, float32, on the device of the layer.
    """
    scale = 2.0 if alpha is None else alpha / rank
    changed: list[nn.Linear] = []
    found: dict[str, nn.Parameter] = {}
    try:
        for name, layer in list(_called(module)):
            down = torch.empty(rank, layer.in_features).uniform_(
                -1 / sqrt(layer.in_features),
                1 / sqrt(layer.in_features),
                generator=generator_for(seed, "low rank", name),
            )
            for key, value in ((DOWN, down), (UP, torch.zeros(layer.out_features, rank))):
                found[f"{name}.{key}"] = nn.Parameter(value.to(layer.weight.device))
                layer.register_parameter(key, found[f"{name}.{key}"])
            layer.forward = _changed(layer, scale)  # type: ignore[assignment,method-assign]
            changed.append(layer)
        yield found
    finally:
        for layer in changed:
            del layer.forward
            delattr(layer, DOWN)
            delattr(layer, UP)


def low_rank_parameters(module: nn.Module, rank: int, copies: frozenset[str] = frozenset()) -> int:
    """Count the parameters that `low_rank` adds.

    Args:
        module: may be on the meta device.
        rank: of the changes.
        copies: names of tensors that stand for another; such layers are changed once.
    """
    return sum(
        rank * (layer.in_features + layer.out_features)
        for name, layer in _called(module)
        if f"{name}.weight" not in copies
    )


def _called(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers that a forward calls, with their names."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            owner = module.get_submodule(name.rpartition(".")[0])
            if type(owner).__name__ not in _READ_ALONE:
                yield name, layer


def _changed(layer: nn.Linear, scale: float) -> Callable[[Tensor], Tensor]:
    plain = layer.forward

    def forward(inputs: Tensor) -> Tensor:
        down, up = layer.get_parameter(DOWN), layer.get_parameter(UP)
        change = nn.functional.linear(nn.functional.linear(inputs, down), up)
        return plain(inputs) + scale * change

    return forward
