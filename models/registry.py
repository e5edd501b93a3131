"""Which adapter serves which stock class. Torch-free until an adapter is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..runtime.language_config import LANGUAGE_CLASSES

if TYPE_CHECKING:
    from .base import Family

FAMILY_NAMES: Mapping[str, str] = {
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "UNet2DConditionModel": "unet",
    **dict.fromkeys(LANGUAGE_CLASSES, "llm"),
}
_ADAPTERS: Mapping[str, str] = {
    "dit": "DiTFamily",
    "pixart": "PixArtFamily",
    "sd3": "SD3Family",
    "unet": "UNetFamily",
    "llm": "LanguageFamily",
}

# Before diffusers 0.30 one class served several models; their configs still say so on the Hub.
_FORMER_CLASS = "Transformer2DModel"
_FORMER_BY_NORM: Mapping[str, str] = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}


def is_language_family(name: str) -> bool:
    """Tell whether a family is one of language models; the others are denoisers."""
    return name == FAMILY_NAMES["LlamaForCausalLM"]


def stock_class_name(given: Any, config: Mapping[str, Any]) -> str | None:
    """Return the supported stock class that a config is for, or None.

    Args:
        given: the config's `_class_name`.
        config: the whole config, which decides for checkpoints of the former common class.
    """
    if given == _FORMER_CLASS:
        return _FORMER_BY_NORM.get(str(config.get("norm_type")))
    return given if isinstance(given, str) and given in FAMILY_NAMES else None


def family_for(class_name: str) -> Family:
    """Return the adapter of a stock class; the class's own library is imported when it is used.

    Raises:
        SourceError: the class is not supported.
    """
    name = FAMILY_NAMES.get(class_name)
    if name is None:
        raise SourceError(
            f"{class_name} is not supported", hint=f"supported classes: {', '.join(FAMILY_NAMES)}"
        )
    module = import_module(f".{name}", __package__)
    family: Family = getattr(module, _ADAPTERS[name])()
    return family
