"""Hold the headers of a checkpoint against the module that was built for it, before anything is allocated.

A name that is missing, another shape, or bytes of another kind of number: each of them would load into
some module without complaint and compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import SourceError
from .headers import DTYPE_CODES, TensorEntry
from .moe_names import stored_shapes

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
Value = TypeVar("Value")
_DOUBLE_HINT = "convert it to float32; `compress run` does that when it opens a checkpoint"
_HINT = "config and weights do not belong together, or the file is damaged; fetch or export it again"


def check_tensors(
    module: nn.Module,
    tensors: Mapping[str, TensorEntry],
    *,
    shared: Mapping[str, str] | None = None,
    cut: bool = False,
) -> None:
    """Hold shapes and dtypes of a checkpoint against a module.

    Args:
        module: as it is to be filled; on any device.
        tensors: of the checkpoint, by the module's names. Names of one side alone are not looked at.
        shared: name of a tensor that is not stored -> name of the stored one.
        cut: the manifest says some of the sizes, for the message.

    Raises:
        SourceError: naming the file and the first tensor that has another shape, or another kind of number.
    """
    source = "config and manifest imply" if cut else "the config implies"
    for whole, tensor in module.state_dict().items():
        shapes = stored_shapes(type(module).__name__, {whole: tuple(tensor.shape)}, tensors)
        for name, shape in shapes.items():
            entry = tensors.get((shared or {}).get(name, name))
            if entry is None:
                continue
            if entry.shape != shape:
                raise SourceError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}; {source} {list(shape)}",
                    hint=_HINT,
                )
            check_dtype(name, entry, tensor.dtype)


def check_dtype(name: str, entry: TensorEntry, dtype: torch.dtype) -> None:
    """Refuse a stored tensor whose bytes are none of a type that the module computes with.

    Floating point may be stored in any of the types that a model can have, whichever the module has; what
    is no floating point must be exactly what the module has.

    Raises:
        SourceError: naming the file and the tensor.
    """
    wanted = tuple(DTYPE_CODES.values()) if dtype.is_floating_point else tuple(_codes(dtype))
    if entry.dtype not in wanted:
        raise SourceError(
            f"{entry.file}: tensor {name} is stored as {entry.dtype}; the model needs {' or '.join(wanted)}",
            hint=_DOUBLE_HINT if dtype.is_floating_point and entry.dtype == "F64" else _HINT,
        )


def dense_tensors(module: nn.Module, tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of a module's tensors that another library's checkpoint stores as they are.

    Quantized layers are stored as other tensors beside or in place of their weights, whatever the library;
    a module whose own tensors are all there, with no other beside them, is not quantized.
    """
    own = _by_module(dict.fromkeys(tensors))
    for prefix, leaves in _by_module(module.state_dict()).items():
        if own.get(prefix, {}).keys() == leaves.keys():
            yield from ((f"{prefix}.{leaf}" if prefix else leaf, value) for leaf, value in leaves.items())


def _by_module(values: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    found: dict[str, dict[str, Value]] = {}
    for name, value in values.items():
        prefix, _, leaf = name.rpartition(".")
        found.setdefault(prefix, {})[leaf] = value
    return found


def _codes(dtype: torch.dtype) -> Iterator[str]:
    yield from (code for code, known in TORCH_DTYPES.items() if known == dtype)
