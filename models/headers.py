"""Headers of the safetensors files that a checkpoint is made of. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import SourceError
from ..runtime import headers
from ..runtime.headers import TensorEntry as TensorHeader

__all__ = ["TensorHeader", "by_file", "merge_headers", "read_header"]


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return tensor name -> place of one file, in the order of the data.

    Raises:
        SourceError: the file is missing, truncated, or its header does not describe its data.
    """
    return headers.read_header(path)[0]


def merge_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """Read the headers of all shards.

    Raises:
        SourceError: as `read_header`, or a tensor lies in two shards.
    """
    merged: dict[str, TensorHeader] = {}
    for path in files:
        for name, header in read_header(path).items():
            if name in merged:
                raise SourceError(f"{path}: tensor {name!r} is also in {merged[name].file.name}")
            merged[name] = header
    return merged


def by_file(headers: dict[str, TensorHeader]) -> Iterator[tuple[Path, list[tuple[str, TensorHeader]]]]:
    """Group tensors by file, each group in the order of its data."""
    groups: dict[Path, list[tuple[str, TensorHeader]]] = {}
    for name, header in headers.items():
        groups.setdefault(header.file, []).append((name, header))
    for path, group in groups.items():
        yield path, sorted(group, key=lambda item: (item[1].start, item[1].end))
