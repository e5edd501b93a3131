"""Flags of a module, put back afterwards: training or evaluation, which parameters take gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_flags(module: nn.Module) -> Iterator[None]:
    """Put every mode and every `requires_grad` back at the end, also after an exception.

    Within the context they may be changed at will. Objects that are replaced meanwhile keep what they
    have then.

    Args:
        module: with all below it; parts that are in different modes stay so.
    """
    modes = [(child, child.training) for child in module.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for child, mode in modes:
            child.training = mode
