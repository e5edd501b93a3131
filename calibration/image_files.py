"""Which images a recipe names, and what their labels are called; nothing is decoded here. Torch-free.

A folder holds a folder per class, or a table (metadata.csv or metadata.jsonl: file_name, label), or images
without labels; or one of these below train/ and validation/, val/ or test/. A safetensors file holds
`pixels` (uint8 [n, height, width] or [n, height, width, channels]) and perhaps `labels` [n].
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SourceError
from ..models.headers import read_header
from ..runtime.hashes import file_sha256

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TRAIN = "train"
HELD_OUT = ("validation", "val", "test")
"""Names of the other part, the first that is there."""
PIXELS, LABELS = "pixels", "labels"
_TABLE_SUFFIX = ".safetensors"
_METADATA = ("metadata.csv", "metadata.jsonl")
_FILE_NAME, _LABEL = "file_name", "label"
_MAX_METADATA_BYTES = 2**30
_HASHED_BYTES = 2**30
"""Folders up to this size count by the content of all files; larger ones by names, sizes and times."""
HELD_OUT_PARTS = 5
"""One of so many parts is held out where a place does not say what is."""
_LAYOUT_HINT = (
    "a folder with a folder per class, one with a metadata.csv (file_name, label), or a safetensors file"
)


@dataclass(frozen=True)
class FileList:
    """Images that are files.

    Attributes:
        root: folder that they lie in.
        paths: of the images, in a fixed order.
        labels: what each of them is called; None where nothing says it.
        classes: all names that occur, those of empty folders included.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...] | None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    def fingerprint(self) -> str:
        """Return a hash of what the images are, 64 hexadecimal digits; see `_HASHED_BYTES`."""
        stats = [_stat(path) for path in self.paths]
        by_content = sum(stat.st_size for stat in stats) <= _HASHED_BYTES
        rows = [
            [path.relative_to(self.root).as_posix(), *_identity(path, stat, by_content)]
            for path, stat in zip(self.paths, stats, strict=True)
        ]
        return hashlib.sha256(json.dumps([rows, self.labels, self.classes]).encode()).hexdigest()


@dataclass(frozen=True)
class TensorFile:
    """Images that are rows of a tensor.

    Attributes:
        path: the safetensors file.
        count: how many there are.
        size: (height, width) of each.
        channels: 1 or 3.
        labelled: whether the file has labels too; they are numbers.
    """

    path: Path
    count: int
    size: tuple[int, int]
    channels: int
    labelled: bool

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file."""
        try:
            return file_sha256(self.path)
        except OSError as error:
            raise _unreadable(self.path, error) from None


Images = FileList | TensorFile


@dataclass(frozen=True)
class Layout:
    """All images of a place.

    Attributes:
        path: that was named.
        train: what may be calibrated and trained on; all of them where there is no other part.
        held_out: what is only measured on; None where `train` has to be divided.
    """

    path: Path
    train: Images
    held_out: Images | None

    def fingerprint(self) -> str:
        """Return a hash of all images and their labels, 64 hexadecimal digits."""
        held_out = None if self.held_out is None else self.held_out.fingerprint()
        return hashlib.sha256(json.dumps([self.train.fingerprint(), held_out]).encode()).hexdigest()


def held_out_count(images: int) -> int:
    """Return how many of `images` are held out where the place does not say which."""
    return max(1, images // HELD_OUT_PARTS)


def find_images(path: Path) -> Layout:
    """Look at what is at `path`; see the module.

    Raises:
        SourceError: nothing is there, it cannot be read, holds no image, or its layout is ambiguous.
    """
    if path.is_file():
        if path.suffix != _TABLE_SUFFIX:
            raise SourceError(f"{path}: neither a folder nor a safetensors file", hint=_LAYOUT_HINT)
        return Layout(path, _tensor_file(path), None)
    if not path.is_dir():
        raise SourceError(f"{path}: no such folder or file of images", hint=_LAYOUT_HINT)
    parts = _parts(path)
    train = parts.get(TRAIN)
    if train is None:
        if parts:
            raise SourceError(
                f"{path}: has a part {next(iter(parts))!r} and no {TRAIN!r}",
                hint=f"name the folder of that part itself, or add {TRAIN}/",
            )
        return Layout(path, _folder(path), None)
    others = [name for name in HELD_OUT if name in parts]
    return Layout(path, _part(train), _part(parts[others[0]]) if others else None)


def _parts(path: Path) -> dict[str, Path]:
    """Return the name of a part -> its folder or file."""
    found: dict[str, Path] = {}
    for name in (TRAIN, *HELD_OUT):
        places = [place for place in (path / name, path / f"{name}{_TABLE_SUFFIX}") if place.exists()]
        if len(places) > 1:
            raise SourceError(f"{path}: has both {places[0].name} and {places[1].name}", hint="keep one")
        if places:
            found[name] = places[0]
    return found


def _part(path: Path) -> Images:
    return _folder(path) if path.is_dir() else _tensor_file(path)


def _folder(root: Path) -> FileList:
    entries = _entries(root)
    metadata = [path for path in entries if path.name in _METADATA]
    if len(metadata) > 1:
        raise SourceError(f"{root}: has both {metadata[0].name} and {metadata[1].name}", hint="keep one")
    if metadata:
        return _from_metadata(root, metadata[0])
    folders = [path for path in entries if path.is_dir()]
    by_class = {path.name: tuple(_below(path)) for path in folders}
    flat = tuple(path for path in entries if path.suffix.lower() in SUFFIXES and path.is_file())
    if not any(by_class.values()):
        if not flat:
            raise SourceError(f"{root}: holds no images", hint=_LAYOUT_HINT)
        return FileList(root, flat, None)
    if flat:
        raise SourceError(
            f"{root}: {flat[0].name} lies beside folders with images, so its class is not known",
            hint="put every image into the folder of its class",
        )
    paths = tuple(path for paths in by_class.values() for path in paths)
    labels = tuple(name for name, paths in by_class.items() for _ in paths)
    return FileList(root, paths, labels, tuple(by_class))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from None


def _below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and in those below it."""
    for path in _entries(folder):
        if path.is_dir():
            yield from _below(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _from_metadata(root: Path, table: Path) -> FileList:
    rows = list(_rows(table))
    if not rows:
        raise SourceError(f"{table}: has no rows", hint=f"its columns are {_FILE_NAME} and {_LABEL}")
    paths = tuple(_inside(root, table, number, row.get(_FILE_NAME)) for number, row in enumerate(rows, 1))
    given = [row.get(_LABEL) for row in rows]
    if all(label is None for label in given):
        return FileList(root, paths, None)
    for number, label in enumerate(given, 1):
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise SourceError(
                f"{table}: row {number} has no label", hint="give all images a label, or none of them"
            )
    labels = tuple(str(label) for label in given)
    return FileList(root, paths, labels, tuple(sorted(set(labels))))


def _rows(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        if table.stat().st_size > _MAX_METADATA_BYTES:
            raise SourceError(f"{table}: larger than {_MAX_METADATA_BYTES:,} bytes")
        with table.open(encoding="utf-8-sig", newline="") as stream:
            if table.suffix == ".csv":
                yield from csv.DictReader(stream)
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise SourceError(f"{table}: line {number} is no JSON object")
                    yield row
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise SourceError(f"{table}: cannot be read: {error}") from None
    except OSError as error:
        raise _unreadable(table, error) from None


def _inside(root: Path, table: Path, number: int, name: Any) -> Path:
    """Return the place of a row's file; it may not lead out of the folder."""
    if not isinstance(name, str) or not name:
        raise SourceError(f"{table}: row {number} has no {_FILE_NAME}")
    given = PurePosixPath(name)
    if given.is_absolute() or ".." in given.parts or "\\" in name:
        raise SourceError(f"{table}: row {number}: {name!r} leads out of the folder")
    return root / given


def _tensor_file(path: Path) -> TensorFile:
    header = read_header(path)
    pixels, labels = header.get(PIXELS), header.get(LABELS)
    if pixels is None:
        raise SourceError(f"{path}: has no tensor {PIXELS!r}", hint=_LAYOUT_HINT)
    shape = tuple(pixels.shape)
    if pixels.dtype != "U8" or len(shape) not in (3, 4) or 0 in shape or shape[3:] not in ((), (1,), (3,)):
        raise SourceError(
            f"{path}: {PIXELS} is {pixels.dtype} {list(shape)}",
            hint="needed: U8 [n, height, width], or [n, height, width, channels] with 1 or 3 channels",
        )
    if labels is not None and (tuple(labels.shape) != shape[:1] or labels.dtype not in ("U8", "I64")):
        raise SourceError(
            f"{path}: {LABELS} is {labels.dtype} {list(labels.shape)}, needed: U8 or I64 [{shape[0]}]"
        )
    channels = shape[3] if len(shape) == 4 else 1
    return TensorFile(path, shape[0], (shape[1], shape[2]), channels, labels is not None)


def _stat(path: Path) -> Any:
    try:
        return path.stat()
    except OSError:
        return _Missing()


class _Missing:
    """Stands for a file that a table names and that is not there."""

    st_size = 0
    st_mtime_ns = 0


def _identity(path: Path, stat: Any, by_content: bool) -> list[Any]:
    if isinstance(stat, _Missing):
        return ["missing"]
    if not by_content:
        return [stat.st_size, stat.st_mtime_ns]
    try:
        return [file_sha256(path)]
    except OSError:
        return ["unreadable"]


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {error.strerror or error}")
