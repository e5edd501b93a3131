"""AdamW (arXiv 1711.05101) that shrinks matrices alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW

from ...recipes.recovery import TrainingSettings

BETA1 = 0.9
EPSILON = 1e-8


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether weight decay is for this parameter.

    That is so of the weights of linear layers, convolutions and embeddings. Biases, norms and parameters
    that stand alone (class tokens, positions, tables of relative positions, layer scales) have none.

    Args:
        name: dotted; the last part says what the parameter is to its layer.
        parameter: of any shape.
    """
    return name.rpartition(".")[2] == "weight" and parameter.ndim >= 2


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, factors: Mapping[str, float] | None = None
) -> Sequence[dict[str, Any]]:
    """Return the groups of an optimizer: what decays, and the rest; empty ones are left out.

    Args:
        parameters: name -> parameter.
        weight_decay: of matrices.
        factors: name -> what its learning rate is multiplied by; names that are missing have 1. A group
            holds parameters of one factor, as `factor`.
    """
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, item in parameters.items():
        found.setdefault(((factors or {}).get(name, 1.0), not is_matrix(name, item)), []).append(item)
    return [
        {"params": items, "weight_decay": 0.0 if plain else weight_decay, "factor": factor}
        for (factor, plain), items in sorted(found.items(), key=lambda entry: entry[0])
    ]


def adamw(
    parameters: Mapping[str, nn.Parameter],
    settings: TrainingSettings,
    factors: Mapping[str, float] | None = None,
) -> AdamW:
    """Return the optimizer of all recovery stages; see `set_rate`."""
    return AdamW(
        parameter_groups(parameters, settings.weight_decay, factors),
        lr=settings.lr,
        betas=(BETA1, settings.beta2),
        eps=EPSILON,
    )


def set_rate(optimizer: AdamW, rate: float) -> None:
    """Set the learning rate of the next step; groups multiply it by their factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
