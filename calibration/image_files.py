"""Which images a recipe names, and what their labels are called; nothing is decoded here. Torch-free.

A folder holds a folder per class, or a table (metadata.csv or metadata.jsonl: file_name, label), or images
without labels; or one of these below train/ and validation/, val/ or test/. A safetensors file holds
`pixels` (uint8 [n, height, width] or [n, height, width, channels]) and perhaps `labels` [n].
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from stat import S_ISREG

from ..errors import SourceError
from ..models.headers import read_header
from ..runtime.hashes import digest, file_sha256
from .fingerprints import count_by_content, version_of
from .image_tables import METADATA, read_table

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TRAIN = "train"
HELD_OUT = ("validation", "val", "test")
"""Names of the other part, the first that is there."""
PIXELS, LABELS = "pixels", "labels"
_TABLE_SUFFIX = ".safetensors"
_SHOWN = 3
HELD_OUT_PARTS = 5
"""One of so many parts is held out where a place does not say what is."""
_LAYOUT_HINT = (
    "a folder with a folder per class, one with a metadata.csv (file_name, label), or a safetensors file"
)


EMPTY_HINT = "add images to it or remove it, or leave out calibration.strict"


@dataclass(frozen=True)
class FileList:
    """Images that are files.

    Attributes:
        root: folder that they lie in.
        paths: of the images, in a fixed order.
        labels: what each of them is called; None where nothing says it.
        classes: all names that occur, those of empty folders included.
        lack: why there are no labels, where a table has columns and none of labels; empty otherwise.
    """

    root: Path
    paths: tuple[Path, ...]
    labels: tuple[str, ...] | None
    classes: tuple[str, ...] = ()
    lack: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether there are labels."""
        return self.labels is not None

    @property
    def empty(self) -> tuple[str, ...]:
        """Classes whose folders hold no image."""
        return tuple(sorted(set(self.classes) - set(self.labels or ())))

    @cached_property
    def sizes(self) -> tuple[int | None, ...]:
        """Bytes of the files; None: not there, or no regular file."""
        stats = map(_stat, self.paths)
        return tuple(None if stat is None else stat.st_size for stat in stats)

    @cached_property
    def hashes(self) -> tuple[str | None, ...] | None:
        """SHA-256 of the files; None: cannot be read. None instead of all where they are too many to read."""
        if not count_by_content(size or 0 for size in self.sizes):
            return None
        return tuple(
            None if size is None else _hash(path) for path, size in zip(self.paths, self.sizes, strict=True)
        )

    def fingerprint(self) -> str:
        """Return a hash of what the images are, 64 hexadecimal digits; see `fingerprints`."""
        names = [path.relative_to(self.root).as_posix() for path in self.paths]
        if self.hashes is not None:
            return digest([names, self.hashes, self.labels, self.classes])
        found = [None if stat is None else version_of(stat) for stat in map(_stat, self.paths)]
        return digest([names, found, self.labels, self.classes])


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
            raise _cannot_read(self.path, error) from None


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

    @property
    def classes(self) -> list[str]:
        """Names of the classes of all parts, sorted; none where labels are numbers or there are none."""
        files = [part for part in (self.train, self.held_out) if isinstance(part, FileList)]
        return sorted({name for part in files for name in part.classes})

    @property
    def emptiness(self) -> str:
        """Which folders of classes hold no image, as a sentence; empty: none."""
        files = [part for part in (self.train, self.held_out) if isinstance(part, FileList) and part.empty]
        return "; ".join(
            f"{part.root}: no image is in the folder{'s' if len(part.empty) > 1 else ''} "
            + ", ".join(map(repr, part.empty[:_SHOWN]))
            + (f" and {len(part.empty) - _SHOWN} more" if len(part.empty) > _SHOWN else "")
            for part in files
        )

    def fingerprint(self) -> str:
        """Return a hash of all images and their labels, 64 hexadecimal digits."""
        held_out = None if self.held_out is None else self.held_out.fingerprint()
        return digest([self.train.fingerprint(), held_out])


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
    train, held_out = parts_of(path, _TABLE_SUFFIX)
    return Layout(
        path, _folder(path) if train is None else _part(train), None if held_out is None else _part(held_out)
    )


def parts_of(path: Path, suffix: str) -> tuple[Path | None, Path | None]:
    """Find the parts of a folder.

    Args:
        path: the folder.
        suffix: of a file that may stand for the folder of a part.

    Returns:
        The place to train on and that to measure on; None, None: the folder has no parts.

    Raises:
        SourceError: a part is there twice, or none to train on.
    """
    found: dict[str, Path] = {}
    for name in (TRAIN, *HELD_OUT):
        places = [place for place in (path / name, path / f"{name}{suffix}") if place.exists()]
        if len(places) > 1:
            raise SourceError(f"{path}: has both {places[0].name} and {places[1].name}", hint="keep one")
        if places:
            found[name] = places[0]
    if found and TRAIN not in found:
        raise SourceError(
            f"{path}: has a part {next(iter(found))!r} and no {TRAIN!r}",
            hint=f"name the folder of that part itself, or add {TRAIN}/",
        )
    return found.pop(TRAIN, None), next(iter(found.values()), None)


def _part(path: Path) -> Images:
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise SourceError(f"{path}: neither a folder nor a safetensors file", hint=_LAYOUT_HINT)
    return _tensor_file(path)


def _folder(root: Path) -> FileList:
    entries = _entries(root)
    metadata = [path for path in entries if path.name in METADATA]
    if len(metadata) > 1:
        raise SourceError(f"{root}: has both {metadata[0].name} and {metadata[1].name}", hint="keep one")
    if metadata:
        table = read_table(root, metadata[0])
        return FileList(root, table.paths, table.labels, tuple(sorted(set(table.labels or ()))), table.lack)
    seen = {_place(root): root}
    by_class = {path.name: tuple(_below([path], seen)) for path in entries if path.is_dir()}
    flat = tuple(path for path in entries if path.suffix.lower() in SUFFIXES and not path.is_dir())
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
        raise _cannot_read(folder, error) from None


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the images in a folder and in those below it, but for what is hidden.

    What is no regular file is yielded, too: it is counted as one that cannot be read.

    Raises:
        SourceError: a folder cannot be read, or is met twice.
    """
    return _below(list(reversed(_entries(folder))), {_place(folder): folder})


def _below(waiting: list[Path], seen: dict[tuple[int, int], Path]) -> Iterator[Path]:
    """Yield the images of some paths, the last first; `seen` has the folders that were entered."""
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            other = seen.setdefault(_place(path), path)
            if other is not path:
                raise SourceError(
                    f"{path}: is the same folder as {other}, so its images would count twice",
                    hint="remove the link",
                )
            waiting.extend(reversed(_entries(path)))
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _place(folder: Path) -> tuple[int, int]:
    """Return what a folder is on its disk, whatever leads there."""
    try:
        stat = folder.stat()
    except OSError as error:
        raise _cannot_read(folder, error) from None
    return stat.st_dev, stat.st_ino


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


def _stat(path: Path) -> os.stat_result | None:
    """Return what is known of a regular file; None: it is none, or a table names what is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat if S_ISREG(stat.st_mode) else None


def _hash(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _cannot_read(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path}: cannot be read: {error.strerror or error}")
