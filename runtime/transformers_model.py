"""Building a stock module of transformers from its config; no code but that library's own runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from ..errors import SourceError
from .language_config import class_name_of
from .mapped_router import put_mapped_routers
from .mapped_routing import KEY, is_mapped
from .transformers_config import stock_arguments


def build_transformers_model(config: Mapping[str, Any], where: str = "config.json") -> nn.Module:
    """Build the stock module on the current default device, in the current default dtype.

    Where the config says that routers are mapped, they take the place of the stock class's.

    Args:
        config: as `transformers_config.complete_transformers_config` accepts it, `_class_name` or not.
        where: for the message.

    Raises:
        SourceError: the stock class refuses the config.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    name = str(class_name_of(config))
    try:
        stock_config = transformers.AutoConfig.for_model(**stock_arguments(config))
        module: nn.Module = getattr(transformers, name)(stock_config)
    except (
        AssertionError,
        AttributeError,
        IndexError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{where}: {name} refuses it: {reason}") from error
    if is_mapped(config):
        put_mapped_routers(module, name, int(config[KEY]))
        module.save_pretrained = _refuse_saving  # type: ignore[assignment]
    return module


def _refuse_saving(*arguments: Any, **keywords: Any) -> NoReturn:
    """Stand for the stock method, whose config would tell of a stock model and open no more.

    Raises:
        TypeError: always, with the way that works.
    """
    raise TypeError(
        "this model has mapped routers, of which the stock class cannot write a config; open the folder by"
        " AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True) to save it again"
    )
