"""Building the stock module of a class whose modules are known by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from ..errors import SourceError
from ..runtime.transformers_model import build_transformers_model


def stock_module(config: Mapping[str, Any], names: Iterable[str]) -> nn.Module:
    """Build the stock module of transformers, on the current default device.

    Args:
        config: completed, with `_class_name`.
        names: of all tensors of its state dict, as this house knows them.

    Raises:
        SourceError: the config is refused, or the installed library builds the class otherwise.
    """
    module = build_transformers_model(config)
    other = module.state_dict().keys() ^ set(names)
    if other:
        installed = f"transformers {version('transformers')}"
        raise SourceError(
            f"{config['_class_name']}: {installed} builds it with other modules, such as {min(other)}",
            hint="its modules are known as transformers 5.23 has them; install that release",
        )
    return module
