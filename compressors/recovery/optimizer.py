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


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> Sequence[dict[str, Any]]:
    """Return the groups of an optimizer: what decays, and the rest; empty ones are left out."""
    decaying = [item for name, item in parameters.items() if is_matrix(name, item)]
    others = [item for name, item in parameters.items() if not is_matrix(name, item)]
    groups = [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(parameters: Mapping[str, nn.Parameter], settings: TrainingSettings) -> AdamW:
    """Return the optimizer of all recovery stages; the loop sets its learning rate before each step."""
    return AdamW(
        parameter_groups(parameters, settings.weight_decay),
        lr=settings.lr,
        betas=(BETA1, settings.beta2),
        eps=EPSILON,
    )
