"""What holds for every class of transformers, whatever it computes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from .language_config import (
    LANGUAGE_CLASSES,
    check_language_config,
    class_name_of,
    complete_language_config,
    is_language_class,
    structural_arguments,
)
from .vision_config import check_vision_config, complete_vision_config
from .vision_names import by_module_name, stored_name
from .vision_sizes import VISION_CLASSES, is_vision_class

Value = TypeVar("Value")


def is_transformers_class(class_name: object) -> bool:
    """Tell whether a stock class is one of transformers that is supported; the others are of diffusers."""
    return is_language_class(class_name) or is_vision_class(class_name)


def auto_class_of(class_name: str) -> str:
    """Return the class that users of transformers load any model of this kind with."""
    return "AutoModelForImageClassification" if is_vision_class(class_name) else "AutoModelForCausalLM"


def complete_transformers_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    complete = complete_vision_config if is_vision_class(class_name) else complete_language_config
    return complete(class_name, config, where)


def check_transformers_config(config: Mapping[str, Any], tensors: int, size: int, where: str) -> None:
    """Refuse a config that its checkpoint cannot belong to, before anything of its sizes is built.

    Args:
        config: config.json of a folder, of a class of transformers.
        tensors: how many the folder stores.
        size: bytes of all tensors.
        where: for the message.

    Raises:
        SourceError: naming the first value that is wrong.
    """
    class_name = str(class_name_of(config))
    if is_vision_class(class_name):
        check_vision_config(class_name, config, tensors, size, where)
    else:
        check_language_config(config, tensors, where)


def stock_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stock config class is built from; nothing that makes it fetch or run other code."""
    name = str(class_name_of(config))
    classes = VISION_CLASSES if is_vision_class(name) else LANGUAGE_CLASSES
    return {**structural_arguments(config), "model_type": classes[name][0]}


def named_as_modules(class_name: str | None, tensors: Mapping[str, Value], where: str) -> dict[str, Value]:
    """Return a checkpoint's tensors under the names that they have in the module.

    Raises:
        SourceError: two stored tensors are one tensor of the module.
    """
    return by_module_name(tensors, where) if is_vision_class(class_name) else dict(tensors)


def named_as_stored(class_name: str, name: str) -> str:
    """Return the name that stock code gives a tensor of the module when it saves it."""
    return stored_name(name) if is_vision_class(class_name) else name
