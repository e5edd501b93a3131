"""Files inside an uncompressed tar archive, found without unpacking it. Torch-free.

The archive may come from anyone: what its entries say is bounded before memory is taken, and nothing in
it is written anywhere.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import SourceError
from .file_parts import FilePart

MAX_MEMBERS = 2**20
_MAX_HEADER = 2**20
"""Bytes of what stands before a file; more than its name and its times take."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_DAMAGED = (
    *(tarfile.TarError, OSError, ValueError, OverflowError, TypeError, LookupError, EOFError),
    RecursionError,
)
"""What the standard library raises for damaged archives: it has no common type for it."""


class _Bounded:
    """A stream that gives no more than a header takes until `renew`: entries claim how long theirs are."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.renew()

    def renew(self) -> None:
        """Expect another header."""
        self._left = _MAX_HEADER

    def read(self, size: int) -> bytes:
        """Read as a file does, within the bound."""
        if not 0 <= size <= self._left:
            raise ValueError(f"an entry that is no file has more than {_MAX_HEADER:,} bytes")
        self._left -= size
        return self._stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tar_parts(path: Path) -> list[FilePart]:
    """Return the regular files of an archive, sorted by their names.

    Raises:
        SourceError: it cannot be read, is compressed or damaged, or names are not plain, or stand twice.
    """
    found: dict[str, FilePart] = {}
    try:
        with path.open("rb") as stream:
            _check_uncompressed(path, stream.read(8))
            stream.seek(0)
            for member in _members(stream):
                name = _plain_name(path, member)
                if name is None:
                    continue
                if name in found:
                    raise SourceError(f"{path}: holds {name} twice", hint="pack it again, every file once")
                found[name] = FilePart(name, path, member.offset_data, member.size)
    except _DAMAGED as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"{path}: cannot be read as a tar archive: {reason}", hint="give it whole, or unpack it"
        ) from None
    return [found[name] for name in sorted(found)]


def _check_uncompressed(path: Path, first: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if first.startswith(magic):
            raise SourceError(
                f"{path}: is compressed ({kind}), so its files cannot be read where they are",
                hint="decompress it to a plain .tar, or unpack it and name the folder",
            )


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the entries; each begins behind the one before, so this ends."""
    bounded: Any = _Bounded(stream)
    archive: Any
    with tarfile.open(fileobj=bounded, mode="r:") as archive:
        before = -1
        for _ in range(MAX_MEMBERS):
            member = archive.next()
            if member is None:
                # The library takes an archive that was cut off between two entries for a whole one.
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise ValueError("it ends without the mark of its end, so entries may be missing")
                return
            if member.size < 0 or member.offset_data <= before:
                raise ValueError(f"{member.name[:80]!r} has no place in it")
            before = member.offset_data
            archive.members.clear()  # the library keeps them all otherwise
            yield member
            bounded.renew()
    raise ValueError(f"it has more than {MAX_MEMBERS:,} entries")


def _plain_name(path: Path, member: tarfile.TarInfo) -> str | None:
    """Return the name of a regular file; None: the entry is something else.

    Raises:
        SourceError: the name leads out of the archive.
    """
    if not member.isreg() or member.issparse():
        return None
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or not name.parts:
        raise SourceError(
            f"{path}: the name {member.name[:80]!r} leads out of the archive", hint="pack it with plain names"
        )
    return name.as_posix()
