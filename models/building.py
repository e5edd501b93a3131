"""Building stock modules for their sizes alone, or to be filled; the global generator stays as it was.

Stock constructors draw a few tensors from it, whatever becomes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..runtime.manifest import ModuleSurgery
from ..runtime.surgery import apply_surgery


class Builder(Protocol):
    """What builds the stock module of a config: a family."""

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build it on the current default device."""


def meta_module(
    family: Builder, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery] | None = None
) -> nn.Module:
    """Build a module on the meta device, its buffers too: no memory, no weights.

    Args:
        family: of the class.
        config: completed, with `_class_name`.
        surgery: what the module has otherwise than the config implies.

    Raises:
        SourceError: the surgery does not fit.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = family.build(config)
    apply_surgery(module, surgery or {})
    return module


def empty_module(family: Builder, config: Mapping[str, Any]) -> nn.Module:
    """Build a module with parameters on the meta device and real, computed buffers."""
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return family.build(config)
