"""Which images a recipe names for a model that segments, and the files with their masks. Torch-free.

A folder of images, however deep, or an uncompressed .tar of one as SA-1B is distributed; or one of these
below train/ (or train.tar) and validation/, val/ or test/. The masks of NAME.jpg stand in NAME.json beside
it. Names of folders and tables of labels say nothing here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from ..errors import SourceError
from ..runtime.hashes import digest
from .file_parts import FilePart
from .fingerprints import count_by_content
from .image_contents import in_steps
from .image_files import HELD_OUT_PARTS, SUFFIXES, held_out_count, images_below, parts_of
from .tar_files import tar_parts

MASKS_SUFFIX = ".json"
ARCHIVE_SUFFIX = ".tar"
_ARCHIVES = frozenset({ARCHIVE_SUFFIX, ".tgz"})  # .tar.gz and .tgz are refused with what to do
MASKS_HINT = "masks of NAME.jpg stand in NAME.json beside it, as in SA-1B"
LAYOUT_HINT = f"name a folder of images, or an uncompressed .tar of one; {MASKS_HINT}"


@dataclass(frozen=True)
class SceneFiles:
    """Images of one part, and the files of their masks.

    Attributes:
        root: folder or archive that they lie in.
        images: in the order of their names.
        masks: of each image the file of its masks; None where there is none.
    """

    root: Path
    images: tuple[FilePart, ...]
    masks: tuple[FilePart | None, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def masked(self) -> tuple[bool, ...]:
        """Whether a file of masks lies beside each image; it may turn out to hold none."""
        return tuple(part is not None for part in self.masks)

    @cached_property
    def sizes(self) -> tuple[int | None, ...]:
        """Bytes of the images; None: not there, or no regular file."""
        return tuple(part.size for part in self.images)

    @cached_property
    def hashes(self) -> tuple[str | None, ...] | None:
        """SHA-256 of the images; None: cannot be read. None instead of all: they are too many to read."""
        masks = (part.size for part in self.masks if part is not None)
        if not count_by_content(size or 0 for size in (*self.sizes, *masks)):
            return None
        return tuple(map(_hash, self.images))

    def fingerprint(self) -> str:
        """Return a hash of images and masks, 64 hexadecimal digits; see `fingerprints`.

        As long as files count by content, a folder and an archive of it have the same.
        """
        names = [part.name for part in self.images]
        if self.hashes is not None:
            return digest([names, self.hashes, [part and _hash(part) for part in self.masks]])
        versions = [[part and part.version() for part in parts] for parts in (self.images, self.masks)]
        return digest([names, versions])


@dataclass(frozen=True)
class SceneLayout:
    """All images of a place.

    Attributes:
        path: that was named.
        train: what may be calibrated and trained on; all of them where there is no other part.
        held_out: what is only measured on; None where `train` has to be divided.
    """

    path: Path
    train: SceneFiles
    held_out: SceneFiles | None

    def fingerprint(self) -> str:
        """Return a hash of all images and masks, 64 hexadecimal digits."""
        held_out = None if self.held_out is None else self.held_out.fingerprint()
        return digest([self.train.fingerprint(), held_out])


def find_scenes(path: Path) -> SceneLayout:
    """Look at what is at `path`; see the module.

    Raises:
        SourceError: nothing is there, it cannot be read, holds no image, or its layout is ambiguous.
    """
    if not path.is_dir():
        return SceneLayout(path, _part(path), None)
    train, held_out = parts_of(path, ARCHIVE_SUFFIX)
    return SceneLayout(
        path, _part(path if train is None else train), None if held_out is None else _part(held_out)
    )


def equal_scenes(*sets: SceneFiles) -> list[list[Hashable]]:
    """Return for each set what its images hold; equal values mean equal images, across the sets as well.

    What cannot be read is equal to nothing. Masks do not count.
    """
    parts = [part for item in sets for part in item.images]
    known = [item.hashes for item in sets]
    if all(values is not None for values in known):
        marks = [mark for values in known for mark in values or ()]
    else:
        sizes = [size for item in sets for size in item.sizes]
        marks = in_steps(parts, sizes, FilePart.ends_sha256, FilePart.sha256)
    told = [index if mark is None else mark for index, mark in enumerate(marks)]
    remaining = iter(told)
    return [[next(remaining) for _ in item.images] for item in sets]


def held_out_counts(masked: int, others: int) -> tuple[int, int]:
    """Return how many images are held out where the place does not say which: a fifth, at least one.

    Args:
        masked: images with masks.
        others: images without.

    Returns:
        How many of each.
    """
    if not masked:
        return 0, held_out_count(others)
    return held_out_count(masked), others // HELD_OUT_PARTS


def choice_count(images: int, wanted: int) -> int:
    """Return how many of `images` are set apart for the choice where `wanted` are asked for."""
    return min(wanted, held_out_count(images))


def _part(path: Path) -> SceneFiles:
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise SourceError(f"{path}: no such folder or archive of images", hint=LAYOUT_HINT)
    if not _ARCHIVES.intersection(map(str.lower, path.suffixes)) or not path.is_file():
        raise SourceError(f"{path}: neither a folder nor a {ARCHIVE_SUFFIX} archive", hint=LAYOUT_HINT)
    parts = {part.name: part for part in tar_parts(path)}
    images = [part for name, part in parts.items() if _is_image(name)]
    if not images:
        raise SourceError(f"{path}: holds no images", hint=LAYOUT_HINT)
    return SceneFiles(path, tuple(images), tuple(parts.get(_masks_name(part.name)) for part in images))


def _folder(root: Path) -> SceneFiles:
    images = [FilePart(path.relative_to(root).as_posix(), path) for path in images_below(root)]
    if not images:
        archive = next((path for path in sorted(root.iterdir()) if path.suffix == ARCHIVE_SUFFIX), None)
        hint = LAYOUT_HINT if archive is None else f"name the archive itself: {archive}"
        raise SourceError(f"{root}: holds no images", hint=hint)
    images.sort(key=lambda part: part.name)
    return SceneFiles(root, tuple(images), _beside(images))


def _beside(images: Sequence[FilePart]) -> tuple[FilePart | None, ...]:
    masks = []
    for part in images:
        path = part.path.with_suffix(MASKS_SUFFIX)
        masks.append(FilePart(_masks_name(part.name), path) if path.exists() else None)
    return tuple(masks)


def _masks_name(image: str) -> str:
    return PurePosixPath(image).with_suffix(MASKS_SUFFIX).as_posix()


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def _hash(part: FilePart) -> str | None:
    try:
        return part.sha256()
    except OSError:
        return None
