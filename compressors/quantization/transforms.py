"""Which scale and rotation every group of layers gets: the settings' question, answered on data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...calibration.seeds import generator_for
from ...recipes.stages import GridSettings
from ...runtime.manifest import ActivationScheme
from ...runtime.rotation import random_signs
from . import balance
from .grid import Grid
from .inputs import Inputs
from .scheme import Group, options_of, rotation_block

_LEAST_AUTO_BLOCK = 16


def transform_of(
    group: Group,
    module: nn.Module,
    settings: GridSettings,
    inputs: Inputs,
    sources: Mapping[str, str],
    seed: int,
    kind: Grid,
    activation: ActivationScheme | None,
) -> balance.Transform:
    """Choose a group's transform by its error on calibration rows.

    Args:
        group: of layers that share an input.
        module: with their weights.
        settings: of the stage.
        inputs: what was kept of the calibration.
        sources: layer -> the layer whose recorded input stands for its own.
        seed: of the rotation's signs.
        kind: grid of the weights.
        activation: grid of the inputs; None leaves them.
    """
    weights = [_weight(module, name) for name in group.targets]
    recorded = [name for name in dict.fromkeys(sources[t] for t in group.targets) if name in inputs.maximum]
    if not recorded:  # experts that no token of the calibration met
        return balance.Transform()
    weight_max = torch.stack([weight.abs().amax(dim=0).float() for weight in weights]).amax(dim=0)
    return balance.choose_transform(
        _question(group.targets[0], weights[0], settings, seed),
        torch.stack([inputs.maximum[name] for name in recorded]).amax(dim=0),
        weight_max,
        [
            balance.sampled(weight, inputs.rows_of(sources[name], weight.shape[1]).to(weight.device))
            for name, weight in zip(group.targets, weights, strict=True)
        ],
        kind,
        activation,
    )


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = module.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _question(name: str, weight: Tensor, settings: GridSettings, seed: int) -> balance.Question:
    options, columns = options_of(settings), weight.shape[1]
    asked, kind = options.act_exponent, options.rotation
    exponents: tuple[float | None, ...] = (None,)
    if asked == "sweep":
        exponents = (None, *balance.SWEEP)
    elif asked is not None:
        exponents = (float(asked),)
    blocks: tuple[int | None, ...] = (rotation_block("block" if kind == "auto" else kind, columns),)
    if kind == "auto":
        wide = (blocks[0] or 0) >= _LEAST_AUTO_BLOCK
        blocks = (None, *blocks) if wide else (None,)
    sign = random_signs(columns, generator_for(seed, "rotation", name))
    return balance.Question(exponents, blocks, sign.to(weight.device))
