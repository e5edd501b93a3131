"""What holds for every class of transformers, whatever it computes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from . import moe_names, vision_names
from .language_config import (
    LANGUAGE_CLASSES,
    check_language_config,
    class_name_of,
    complete_language_config,
    is_language_class,
    language_shape,
    structural_arguments,
    tied_head,
)
from .moe_classes import MOE_CLASSES, is_moe_class
from .moe_config import check_moe_config, complete_moe_config, moe_shape
from .sam_config import check_sam_config, complete_sam_config, sam_arguments, sam_copies
from .sam_sizes import SAM_CLASSES, is_sam_class
from .vision_config import check_vision_config, complete_vision_config
from .vision_sizes import VISION_CLASSES, is_vision_class

Value = TypeVar("Value")


def is_transformers_class(class_name: object) -> bool:
    """Tell whether a stock class is one of transformers that is supported; the others are of diffusers."""
    return is_language_class(class_name) or is_vision_class(class_name) or is_sam_class(class_name)


def auto_class_of(class_name: str) -> str:
    """Return the class that users of transformers load any model of this kind with."""
    if is_sam_class(class_name):
        return class_name  # the automatic class for masks knows other models, too, which take other inputs
    return "AutoModelForImageClassification" if is_vision_class(class_name) else "AutoModelForCausalLM"


def complete_transformers_config(class_name: str, config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config and return it as it stands, with `_class_name` as all other configs have it.

    Raises:
        SourceError: naming `where` and the first value that is wrong or not supported.
    """
    if is_moe_class(class_name):
        return complete_moe_config(class_name, config, where)
    if is_sam_class(class_name):
        return complete_sam_config(class_name, config, where)
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
    elif is_sam_class(class_name):
        check_sam_config(class_name, config, tensors, where)
    elif is_moe_class(class_name):
        check_moe_config(config, tensors, where)
    else:
        check_language_config(config, tensors, where)


def stock_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the stock config class is built from; nothing that makes it fetch or run other code."""
    name = str(class_name_of(config))
    if is_sam_class(name):
        return {**sam_arguments(config), "model_type": SAM_CLASSES[name]}
    if is_moe_class(name):
        model_type = MOE_CLASSES[name].model_type
    else:
        model_type = (VISION_CLASSES if is_vision_class(name) else LANGUAGE_CLASSES)[name][0]
    return {**structural_arguments(config), "model_type": model_type}


def implied_copies(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tensors that are one with another one by the config: copy -> stored name.

    Stock checkpoints need not store the copies, and stock classes make them again.
    """
    class_name = class_name_of(config)
    if is_sam_class(class_name):
        return sam_copies(config)
    return tied_head(config) if is_language_class(class_name) else {}


def longest_sequence(config: Mapping[str, Any]) -> int:
    """Return the most tokens that a language model takes.

    Args:
        config: completed, with `_class_name`.
    """
    of_moe = is_moe_class(config["_class_name"])
    return moe_shape(config).positions if of_moe else language_shape(config).positions


def named_as_modules(class_name: str | None, tensors: Mapping[str, Value], where: str) -> dict[str, Value]:
    """Return a checkpoint's tensors under the names that they, or what they are parts of, have in the module.

    Raises:
        SourceError: two stored tensors are one tensor of the module.
    """
    if is_moe_class(class_name):
        return moe_names.by_module_name(str(class_name), tensors, where)
    return vision_names.by_module_name(tensors, where) if is_vision_class(class_name) else dict(tensors)


def named_as_stored(class_name: str, name: str) -> str:
    """Return the name that stock code gives a tensor of the module, or a part of one, when it saves it."""
    if is_moe_class(class_name):
        return moe_names.stored_name(class_name, name)
    return vision_names.stored_name(name) if is_vision_class(class_name) else name
