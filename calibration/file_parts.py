"""A file, or a stretch of one such as a member of an archive: read where it lies. Torch-free."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

from .fingerprints import version_of

_END_BYTES = 2**12


@dataclass(frozen=True)
class FilePart:
    """Some bytes on disk.

    Attributes:
        name: what they are called, relative to where they were found, with forward slashes.
        path: of the file that holds them.
        start: where they begin in it.
        length: how many they are; None: all of the file.
    """

    name: str
    path: Path
    start: int = 0
    length: int | None = None

    @property
    def where(self) -> str:
        """What errors call it."""
        return str(self.path) if self.length is None else f"{self.path}: {self.name}"

    @property
    def stat(self) -> os.stat_result | None:
        """What is known of the file; None: it is not there, or no regular file."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found if S_ISREG(found.st_mode) else None

    @property
    def size(self) -> int | None:
        """How many bytes there are; None: the file is not there, or no regular file."""
        found = self.stat
        if found is None:
            return None
        return found.st_size if self.length is None else self.length

    def version(self) -> list[int] | None:
        """Return what they count by where they are not read; None: not there."""
        found = self.stat
        if found is None:
            return None
        return version_of(found) if self.length is None else [*version_of(found), self.start, self.length]

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """Open them as a stream that begins and ends with them.

        Raises:
            OSError: they cannot be read.
        """
        # A pipe or a device would keep whoever opens it waiting.
        if not S_ISREG(self.path.stat().st_mode):
            raise OSError("no regular file")
        with self.path.open("rb") as stream:
            if self.length is None:
                yield stream
            else:
                stretch: Any = io.BufferedReader(_Stretch(stream, self.start, self.length))
                with stretch:
                    yield stretch

    def read(self, most: int) -> bytes | None:
        """Return them; None: they are more than `most`.

        Raises:
            OSError: they cannot be read.
        """
        with self.open() as stream:
            data = stream.read(most + 1)
        return data if len(data) <= most else None

    def sha256(self) -> str:
        """Return their SHA-256.

        Raises:
            OSError: they cannot be read.
        """
        with self.open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def ends_sha256(self) -> str:
        """Return the SHA-256 of their first and last 4,096.

        Raises:
            OSError: they cannot be read.
        """
        with self.open() as stream:
            found = hashlib.sha256(stream.read(_END_BYTES))
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _END_BYTES))
            found.update(stream.read(_END_BYTES))
        return found.hexdigest()


class _Stretch(io.RawIOBase):
    """`length` bytes of a stream from `start` on; there is no `fileno`, which would be that of the whole."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(self._length - self._at, 0))
        self._stream.seek(self._start + self._at)
        data = self._stream.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
