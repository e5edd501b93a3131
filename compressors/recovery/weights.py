"""The weights of a model while it is trained: in float32, with gradients, in training mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ...calibration.flags import keeping_flags
from ...errors import PlanError


def refuse_quantized(method: str, quantized: bool, why: str = "rounded weights cannot be trained") -> None:
    """Refuse integer weights: they have no gradient.

    Args:
        method: that is to train, or to look ahead by training.
        quantized: whether the model has any.
        why: they are of no use to the method.

    Raises:
        PlanError: there are some.
    """
    if quantized:
        raise PlanError(f"the model is quantized, and {why}", hint=f"put {method} before the quantizer")


@contextmanager
def training(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Make a module one that can be trained; afterwards it is of the kind that it was before.

    Trained are the named parameters and no others. They are float32 in between, whatever they are stored
    in, and are rounded once, at the end; the parameter objects stay the same. What is not trained keeps
    its type all the time. Gradients are gone afterwards.

    Args:
        module: of which the parameters are.
        parameters: name -> what is trained.
    """
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    trained = set(map(id, parameters.values()))
    with keeping_flags(module):
        try:
            for parameter in module.parameters():
                parameter.requires_grad_(id(parameter) in trained)
            for parameter in parameters.values():
                parameter.data = parameter.data.to(torch.float32)
            module.train()
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.grad = None
                parameter.data = parameter.data.to(dtypes[name])
