"""Headers of safetensors files, parsed as the untrusted input that they are. Torch-free.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors. Every number is
held against the file's real size before anything is allocated for it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..errors import SourceError
from .strict_json import parse_object

MAX_HEADER_BYTES = 100 * 2**20
MAX_LENGTH = 2**48

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

DTYPE_CODES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Floating-point types of models: torch's name -> the format's."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Files of weights that are no safetensors; opening one can run code, so none ever is."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: the format's name: "F32", "BF16", ...
        shape: dimensions.
        start: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Bytes as stored."""
        return self.end - self.start


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        Tensor name -> place, in the order of the data; and the file's metadata.

    Raises:
        SourceError: the file is missing, truncated, or its header does not describe its data.
    """
    text, data_start, size = _header_text(path)
    document = parse_object(text, f"{path}: the safetensors header")
    metadata = document.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{path}: __metadata__ in the safetensors header is not an object of texts")
    tensors = {name: _entry(path, name, entry, data_start, size) for name, entry in document.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    _check_cover(path, ordered, data_start, size)
    return ordered, metadata


def _header_text(path: Path) -> tuple[bytes, int, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise SourceError(f"{path}: truncated: {size} bytes are no safetensors file", hint=_COPY_HINT)
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise SourceError(f"{path}: the header claims {length} bytes; this is no safetensors file")
            if length > size - 8:
                raise SourceError(
                    f"{path}: truncated: the header claims {length} bytes, the file has {size}",
                    hint=_COPY_HINT,
                )
            return handle.read(length), 8 + length, size
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None


_COPY_HINT = "copy or download the file again"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_LENGTH


def _entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise SourceError(f"{where}: the header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise SourceError(f"{where}: dtype {_short(dtype)} is not one of {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise SourceError(f"{where}: shape {_short(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise SourceError(f"{where}: data_offsets {_short(offsets)} are not two positions")
    begin, end = offsets
    if begin > end or data_start + end > size:
        raise SourceError(
            f"{where}: truncated: its data ends at byte {data_start + end}, the file has {size}",
            hint=_COPY_HINT,
        )
    needed = prod(shape) * ITEM_BYTES[dtype]
    if needed != end - begin:
        raise SourceError(
            f"{where}: {dtype} {shape} takes {needed} bytes, its data_offsets hold {end - begin}"
        )
    return TensorEntry(path, dtype, tuple(shape), data_start + begin, data_start + end)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_cover(path: Path, tensors: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Refuse gaps, overlaps and trailing bytes: every byte belongs to exactly one tensor."""
    position = data_start
    for name, header in tensors.items():
        if header.start != position:
            kind = "overlaps the tensor before it" if header.start < position else "leaves a gap before it"
            raise SourceError(f"{path}: tensor {name!r} {kind} (byte {header.start}, expected {position})")
        position = header.end
    if position != size:
        raise SourceError(f"{path}: {size - position} bytes after the last tensor belong to none")
