"""Which images are equal, by the bytes of their files or of their rows. Torch-free.

What is measured on must not be learned from under another name. Of folders that are too large to read as
a whole, files are compared by size, then by their ends, and by everything only where these are equal.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import SourceError
from ..models.headers import read_header
from ..runtime.hashes import file_sha256
from .file_parts import FilePart
from .image_files import PIXELS, FileList, Images, TensorFile

Content = Hashable
_Item = TypeVar("_Item")


def contents(*sets: Images) -> list[list[Content]]:
    """Return for each set what its images hold; equal values mean equal images, across the sets as well.

    A file is never equal to a row. What cannot be read is equal to nothing.

    Raises:
        SourceError: a safetensors file cannot be read.
    """
    files = [item for item in sets if isinstance(item, FileList)]
    by_file = iter(_of_files(files))
    return [next(by_file) if isinstance(item, FileList) else _of_rows(item) for item in sets]


def comparable(one: Images, other: Images) -> bool:
    """Tell whether equal images of two sets can be found."""
    return isinstance(one, FileList) == isinstance(other, FileList)


def _of_files(sets: Sequence[FileList]) -> list[list[Content]]:
    hashes = [item.hashes for item in sets]
    whole = [values for values in hashes if values is not None]
    if len(whole) < len(sets):
        paths = [path for item in sets for path in item.paths]
        sizes = [size for item in sets for size in item.sizes]
        whole = _split(in_steps(paths, sizes, _ends_sha256, file_sha256), sets)
    return [
        [(number, row) if value is None else value for row, value in enumerate(values)]
        for number, values in enumerate(whole)
    ]


def _split(values: Sequence[str | None], sets: Sequence[FileList]) -> list[tuple[str | None, ...]]:
    """Divide the values of all sets into those of each."""
    remaining = iter(values)
    return [tuple(next(remaining) for _ in item.paths) for item in sets]


def in_steps(
    items: Sequence[_Item], sizes: Sequence[int | None], *reads: Callable[[_Item], str]
) -> list[str | None]:
    """Return what tells files apart, reading as little of them as that takes.

    Args:
        items: the files.
        sizes: their bytes; None: cannot be read.
        reads: from little to everything; each is only asked of those that are equal so far.

    Returns:
        Equal values for equal files; None: cannot be read.
    """
    marks: list[str | None] = [None if size is None else f"size {size}" for size in sizes]
    for read in reads:
        for index in _repeated(marks):
            try:
                marks[index] = f"{marks[index]} {read(items[index])}"
            except OSError:
                marks[index] = None
    return marks


def _repeated(marks: Iterable[str | None]) -> list[int]:
    marks = list(marks)
    counts = Counter(marks)
    return [index for index, mark in enumerate(marks) if mark is not None and counts[mark] > 1]


def _ends_sha256(path: Path) -> str:
    return FilePart(path.name, path).ends_sha256()


def _of_rows(source: TensorFile) -> list[Content]:
    """Return the SHA-256 of every row, with its size: grey rows of one form or the other are equal."""
    entry = read_header(source.path)[PIXELS]
    row_bytes = entry.bytes // source.count
    form = (*source.size, source.channels)
    try:
        with source.path.open("rb") as stream:
            stream.seek(entry.start)
            return [(form, hashlib.sha256(stream.read(row_bytes)).hexdigest()) for _ in range(source.count)]
    except OSError as error:
        raise SourceError(f"{source.path}: cannot be read: {error.strerror or error}") from None
