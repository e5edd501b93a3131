"""Which adapter serves which stock class. Torch-free until an adapter is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SourceError
from ..runtime.language_config import LANGUAGE_CLASSES
from ..runtime.moe_classes import MOE_CLASSES
from ..runtime.sam_sizes import SAM_CLASSES
from ..runtime.vision_sizes import VISION_CLASSES, VISION_KINDS

if TYPE_CHECKING:
    from .base import Family

FAMILY_NAMES: Mapping[str, str] = {
    "DiTTransformer2DModel": "dit",
    "PixArtTransformer2DModel": "pixart",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "HunyuanDiT2DModel": "hunyuan",
    "UNet2DConditionModel": "unet",
    **dict.fromkeys(LANGUAGE_CLASSES, "llm"),
    **dict.fromkeys(MOE_CLASSES, "moe"),
    **{name: VISION_KINDS[model_type] for name, (model_type, _) in VISION_CLASSES.items()},
    **dict.fromkeys(SAM_CLASSES, "sam"),
}
_ADAPTERS: Mapping[str, str] = {
    "dit": "DiTFamily",
    "pixart": "PixArtFamily",
    "sd3": "SD3Family",
    "flux": "FluxFamily",
    "hunyuan": "HunyuanFamily",
    "unet": "UNetFamily",
    "llm": "LanguageFamily",
    "moe": "MoeFamily",
    "vit": "ViTFamily",
    "convnext": "ConvNextFamily",
    "swin": "SwinFamily",
    "sam": "SamFamily",
}
Task = Literal["denoise", "language", "classify", "segment"]
_TASKS: Mapping[str, Task] = {
    "llm": "language",
    "moe": "language",
    **dict.fromkeys(VISION_KINDS.values(), "classify"),
    "sam": "segment",
}

# Before diffusers 0.30 one class served several models; their configs still say so on the Hub.
_FORMER_CLASS = "Transformer2DModel"
_FORMER_BY_NORM: Mapping[str, str] = {
    "ada_norm_zero": "DiTTransformer2DModel",
    "ada_norm_single": "PixArtTransformer2DModel",
}


def task_of(family_name: str) -> Task:
    """Return what models of a family do: denoise images, continue texts, classify images, or segment them."""
    return _TASKS.get(family_name, "denoise")


def is_language_family(name: str) -> bool:
    """Tell whether a family is one of language models."""
    return task_of(name) == "language"


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
