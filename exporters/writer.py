"""A safetensors writer that streams, aligns and shards. Same tensors, same bytes.

The format allows no gaps between tensors, so alignment is a matter of order: the header is padded
to 64 bytes, tensors whose length is a multiple of 64 bytes come first, and the few others follow
with the lengths of the largest power of two first. Every tensor up to and including the first odd
one starts on a 64-byte boundary, and every other one at least on a multiple of its element.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.validate import INDEX_SUFFIX, ITEM_BYTES, WEIGHTS_NAME

ALIGNMENT = 64
DEFAULT_SHARD_BYTES = 5_000_000_000
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
_PLAIN: Mapping[str, str] = {"format": "pt"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written.

    Attributes:
        dtype: safetensors code, such as "BF16".
        read: returns the tensor; called when it is its turn, once per writing. None in predictions.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Length of the data."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> StoredTensor:
        """Describe a tensor that is in memory."""
        return cls(name, _CODES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def dtype_code(dtype: torch.dtype) -> str:
    """Return the safetensors code of a torch dtype."""
    return _CODES[dtype]


def write_tensors(
    folder: Path,
    tensors: Sequence[StoredTensor],
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] = _PLAIN,
    name: str = WEIGHTS_NAME,
) -> list[Path]:
    """Write the tensors, in shards with an index where one file is too small.

    Args:
        folder: exists; its own atomicity is the caller's.
        max_shard_size: bytes of tensor data per file; a larger tensor gets a file of its own.
        metadata: text for the header of every file.
        name: of the file where there is one; shards and index are named after it.

    Returns:
        the files, the index last.

    Raises:
        OSError: the disk is full or refuses; what was written stays in `folder`.
    """
    shards = plan_shards(tensors, max_shard_size, name)
    files = []
    for file, shard in shards.items():
        _write_file(folder / file, shard, metadata)
        files.append(folder / file)
    if len(shards) > 1:
        index = folder / f"{name}{INDEX_SUFFIX}"
        _write_synced(index, [index_text(shards).encode()])
        files.append(index)
    return files


def file_bytes(
    tensors: Sequence[StoredTensor],
    *,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] = _PLAIN,
    name: str = WEIGHTS_NAME,
) -> int:
    """Return the exact number of bytes that `write_tensors` writes, index included."""
    shards = plan_shards(tensors, max_shard_size, name)
    total = sum(len(_header(shard, metadata)) + sum(t.bytes for t in shard) for shard in shards.values())
    return total + (len(index_text(shards).encode()) if len(shards) > 1 else 0)


def file_sha256(tensors: Sequence[StoredTensor], *, metadata: Mapping[str, str] = _PLAIN) -> str:
    """Return the SHA-256 of the one file that `write_tensors` makes of tensors that need no shards.

    Every tensor is read, as it is for being written.
    """
    ordered = _ordered(tensors)
    digest = hashlib.sha256(_header(ordered, metadata))
    for tensor in ordered:
        digest.update(_raw(tensor))
    return digest.hexdigest()


def plan_shards(
    tensors: Sequence[StoredTensor], max_shard_size: int, name: str = WEIGHTS_NAME
) -> dict[str, list[StoredTensor]]:
    """Split by name order into files; inside a file the tensors are in writing order."""
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda t: t.name):
        if groups[-1] and filled + tensor.bytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    stem = name.removesuffix(".safetensors")
    if len(groups) == 1:
        return {name: _ordered(groups[0])}
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": _ordered(group)
        for number, group in enumerate(groups, 1)
    }


def index_text(shards: Mapping[str, Sequence[StoredTensor]]) -> str:
    """Return the text of the index file."""
    index = {
        "metadata": {"total_size": sum(tensor.bytes for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.name: name for name, shard in shards.items() for tensor in shard},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _ordered(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    def key(tensor: StoredTensor) -> tuple[int, str]:
        size = tensor.bytes or ALIGNMENT
        return -min(size & -size, ALIGNMENT), tensor.name

    return sorted(tensors, key=key)


def _header(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for tensor in tensors:
        end = position + tensor.bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _write_file(path: Path, tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> None:
    def chunks() -> object:
        yield _header(tensors, metadata)
        for tensor in tensors:
            yield _raw(tensor)

    _write_synced(path, chunks())  # type: ignore[arg-type]


def _write_synced(path: Path, chunks: Sequence[bytes | memoryview]) -> None:
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            del chunk  # or a tensor would stay in memory while the next one is read
        file.flush()
        os.fsync(file.fileno())


def _raw(tensor: StoredTensor) -> memoryview:
    if tensor.read is None:
        raise ValueError(f"tensor {tensor.name} is a prediction and has no data")
    value = tensor.read().detach().cpu().contiguous()
    if (tuple(value.shape), _CODES[value.dtype]) != (tensor.shape, tensor.dtype):
        raise ValueError(f"tensor {tensor.name} is {value.dtype} {list(value.shape)}, not as announced")
    array: Any = value.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
