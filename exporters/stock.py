"""How the library that a model comes from loads a folder, as Python and for the fresh process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..models.base import Family
from ..runtime.moe_classes import is_moe_class
from ..runtime.moe_names import Part, parts_of
from ..runtime.transformers_config import (
    auto_class_of,
    implied_copies,
    is_transformers_class,
    named_as_stored,
)
from ..runtime.validate import LANGUAGE_WEIGHTS_NAME, WEIGHTS_NAME
from .writer import StoredTensor


def library_of(class_name: str) -> str:
    """Return the library whose class a config names."""
    return "transformers" if is_transformers_class(class_name) else "diffusers"


def loader_of(class_name: str) -> str:
    """Return the class that loads the folder: the stock class itself, or transformers' automatic one."""
    return auto_class_of(class_name) if is_transformers_class(class_name) else class_name


def stock_way(class_name: str, dtype: str) -> str:
    """Return the expression that loads a dense folder, with `path` for its place.

    Args:
        class_name: of config.json.
        dtype: "float32", "float16" or "bfloat16". transformers finds it in the config.
    """
    call = f"{library_of(class_name)}.{loader_of(class_name)}.from_pretrained(path"
    return f"{call})" if is_transformers_class(class_name) else f"{call}, torch_dtype=torch.{dtype})"


def trusting_way(class_name: str) -> str:
    """Return the expression that loads a folder by the code that lies in it, which it runs."""
    return f"{library_of(class_name)}.{loader_of(class_name)}.from_pretrained(path, trust_remote_code=True)"


def registered_way(class_name: str) -> str:
    """Return the expression that loads a folder of ours with the library's own class."""
    return f"import compress; {library_of(class_name)}.{loader_of(class_name)}.from_pretrained(path)"


def weights_name(family: Family) -> str:
    """Return the name of the weight file where there is one."""
    return LANGUAGE_WEIGHTS_NAME if family.library == "transformers" else WEIGHTS_NAME


def named_by_library(class_name: str, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return tensors of a folder that stock classes load, under the names that the library saves them by.

    transformers still saves vision models under the names of its former modules, and reads those in every
    release; names of modules are read by the releases that have such modules alone. Experts it saves one
    by one where all other readers know them so.
    """
    pieces = (piece for tensor in tensors for piece in _pieces(class_name, tensor))
    return [replace(piece, name=named_as_stored(class_name, piece.name)) for piece in pieces]


def one_by_one(class_name: str, tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    """Return tensors of a mixture of experts as `named_by_library` does; of other models as they are."""
    return named_by_library(class_name, tensors) if is_moe_class(class_name) else list(tensors)


def _pieces(class_name: str, tensor: StoredTensor) -> list[StoredTensor]:
    """Return the tensors of which each is one expert's, or the tensor itself where it is stored whole."""
    parts = parts_of(class_name, tensor.name, tensor.shape)
    return [
        StoredTensor(name, tensor.dtype, part.shape(tensor.shape), _reader(part, tensor))
        for name, part in parts.items()
    ] or [tensor]


def _reader(part: Part, whole: StoredTensor) -> Callable[[], Tensor] | None:
    if whole.read is None:
        return None
    read = whole.read
    return lambda: read()[part.expert, part.rows(whole.shape)]


def left_out(config: Mapping[str, Any]) -> frozenset[str]:
    """Return the tensors that the library makes from others again and never stores."""
    return frozenset(implied_copies(config))
