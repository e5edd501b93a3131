"""What the factors of a compressed cache rest on in their original, hashed. Torch-free.

Factors approximate the projections of one model's keys and values. The weights and biases of these, and the
norm that keys pass through afterwards, are hashed attention by attention as they are stored, whatever the
files they are spread over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ...errors import SourceError
from ..headers import TensorEntry

_PARTS = ("k_proj", "v_proj", "k_norm")
_CHUNK_BYTES = 1 << 22


def attention_tensors(attention: str, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Return the names of the stored tensors that the factors of an attention rest on, sorted.

    Args:
        attention: name of the module.
        tensors: of the original, by the names of its module.
    """
    starts = tuple(f"{attention}.{part}." for part in _PARTS)
    return sorted(name for name in tensors if name.startswith(starts))


def attention_sha256(attention: str, tensors: Mapping[str, TensorEntry]) -> str:
    """Return the SHA-256 of name, type, shape and bytes of the tensors that an attention's factors rest on.

    Args:
        attention: name of the module.
        tensors: of the original, by the names of its module.

    Raises:
        SourceError: there are none, or a file is shorter than its header says.
    """
    names = attention_tensors(attention, tensors)
    if not names:
        raise SourceError(
            f"{attention} has no projections of keys and values", hint="it is another kind of model"
        )
    digest = hashlib.sha256()
    for name in names:
        entry = tensors[name]
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        _feed(digest, entry)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, entry: TensorEntry) -> None:
    left = entry.bytes
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        while left:
            part = file.read(min(left, _CHUNK_BYTES))
            if not part:
                raise SourceError(f"{entry.file}: truncated while it was read", hint="fetch it again")
            digest.update(part)
            left -= len(part)
