"""Reading every byte of the weights once: NaN and Inf by tensor name. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..errors import SourceError
from .headers import TensorHeader, by_file

CHUNK_BYTES = 2**20  # small enough to stay in the cache between the read and the test

# An IEEE number is NaN or Inf exactly when its exponent bits are all set, that is when the bits below
# the sign, read as an unsigned integer, reach the bit pattern of infinity. E4M3 has no infinity.
_LIMITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "F64": (np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F16": (np.uint16, 0x7FFF, 0x7C00),
    "BF16": (np.uint16, 0x7FFF, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7F, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
}


def count_not_finite(data: memoryview | bytes | bytearray, dtype: str) -> int:
    """Count the NaN and Inf of a buffer of whole elements.

    Args:
        data: raw little-endian elements.
        dtype: the safetensors name; integer types never hold either.
    """
    if dtype not in _LIMITS or len(data) == 0:
        return 0
    kind, mask, limit = _LIMITS[dtype]
    magnitude = np.bitwise_and(np.frombuffer(data, dtype=kind), kind(mask))
    if magnitude.max() < limit:
        return 0
    return int(np.count_nonzero(magnitude >= limit))


def refuse_not_finite(name: str, header: TensorHeader, count: int) -> None:
    """Raise the error for a tensor with `count` bad elements, if there are any.

    Raises:
        SourceError: naming file, tensor and count.
    """
    if count:
        raise SourceError(
            f"{header.file}: tensor {name!r} ({header.dtype}) holds {count} NaN or Inf values",
            hint="the checkpoint is damaged or its training diverged; take another revision",
        )


def scan_finite(headers: Mapping[str, TensorHeader], advance: Callable[[int], None] | None = None) -> None:
    """Read all weights in chunks of `CHUNK_BYTES` and refuse NaN and Inf.

    Args:
        headers: tensor name -> place.
        advance: called with the bytes of each finished tensor.

    Raises:
        SourceError: naming the first tensor (in file order) that is not finite.
    """
    buffer = bytearray(CHUNK_BYTES)
    for path, tensors in by_file(dict(headers)):
        with path.open("rb", buffering=0) as handle:
            for name, header in tensors:
                handle.seek(header.start)
                refuse_not_finite(name, header, _scan_tensor(handle, header, buffer))
                if advance is not None:
                    advance(header.bytes)


def _scan_tensor(handle: object, header: TensorHeader, buffer: bytearray) -> int:
    count, left = 0, header.bytes
    view = memoryview(buffer)
    while left:
        part = view[: min(left, CHUNK_BYTES)]
        read_exactly(handle, part, header.file)
        count += count_not_finite(part, header.dtype)
        left -= len(part)
    return count


def read_exactly(handle: object, target: memoryview, path: Path) -> None:
    """Fill `target` from an unbuffered binary file.

    Raises:
        SourceError: the file ends early: it shrank since its header was checked.
    """
    filled = 0
    while filled < len(target):
        read = handle.readinto(target[filled:])  # type: ignore[attr-defined]
        if not read:
            raise SourceError(f"{path}: ended while it was read; something else writes to it")
        filled += read
