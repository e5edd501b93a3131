"""Latents on disk that a denoiser is trained on: which there are, of which shapes. Torch-free.

A safetensors file holds `latents` [n, C, H, W], perhaps `flipped` (the same of the mirrored images), and what
the items are conditioned on, n rows each: `labels`, or embeddings as the stock pipelines name them. Or there
are two folders of .npy files with equal names, as scripts that encode ImageNet write them: *features, each
[n, C, H, W], or [n, 2, C, H, W] with the mirrored images second; and *labels, each [n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tokenize import TokenError

import numpy as np

from ..errors import SourceError
from ..models.headers import read_header
from ..runtime.hashes import digest, file_sha256
from .fingerprints import count_by_content, version_of

LATENTS, FLIPPED, LABELS = "latents", "flipped", "labels"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_INTEGERS = frozenset({"U8", "I32", "I64"})
_HINT = (
    "give safetensors files with `latents` [n, C, H, W], or two folders of .npy files, *features and *labels"
)


@dataclass(frozen=True)
class LatentPart:
    """One file of latents.

    Attributes:
        path: of the file.
        count: items in it.
        shape: (C, H, W) of each.
        flipped: whether the mirrored images are there as well.
        conditions: name -> shape of the other tensors of a safetensors file.
        labels: the file with the labels of a .npy file.
    """

    path: Path
    count: int
    shape: tuple[int, int, int]
    flipped: bool
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that it lies in."""
        return (self.path,) if self.labels is None else (self.path, self.labels)


def find_latents(path: Path) -> list[LatentPart]:
    """Look at the headers of all latents at `path`; see the module.

    Raises:
        SourceError: nothing is there, it cannot be read, or its shapes do not fit each other.
    """
    if path.is_file():
        return [latent_table(path)]
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder of latents", hint=_HINT)
    tables = sorted(path.glob("*.safetensors"))
    parts = [latent_table(table) for table in tables] if tables else _arrays(path)
    for part in parts[1:]:
        if _kind(part) != _kind(parts[0]):
            raise SourceError(
                f"{part.path}: its items are {_told(part)}, those of {parts[0].path.name} {_told(parts[0])}",
                hint="give files of one kind",
            )
    return parts


def fingerprint(parts: Sequence[LatentPart]) -> str:
    """Return a hash of all data, 64 hexadecimal digits; see `fingerprints`.

    Raises:
        SourceError: a file cannot be read.
    """
    files = [path for part in parts for path in part.files]
    try:
        stats = [path.stat() for path in files]
        if count_by_content(stat.st_size for stat in stats):
            return digest([[path.name, file_sha256(path)] for path in files])
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror or error}") from None
    return digest([[path.name, *version_of(stat)] for path, stat in zip(files, stats, strict=True)])


def read_array(path: Path) -> np.ndarray:
    """Map an array on disk into memory; nothing in it is ever executed.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        # Not np.load, which goes by the content, and opens archives as well.
        found: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, TypeError, OverflowError, TokenError) as error:
        raise SourceError(f"{path}: cannot be read as an array: {error}") from None
    return found


def _kind(part: LatentPart) -> tuple[object, ...]:
    """Return what all files of a folder have in common, so that items of any of them make one batch."""
    return part.shape, part.flipped, {name: shape[1:] for name, shape in part.conditions.items()}


def _told(part: LatentPart) -> str:
    others = [f"{name} {list(shape[1:])}".removesuffix(" []") for name, shape in part.conditions.items()]
    told = [*(["mirrored ones"] if part.flipped else []), *sorted(others)]
    return f"{list(part.shape)}{' with ' if told else ''}{', '.join(told)}"


def latent_table(path: Path) -> LatentPart:
    """Look at the header of one safetensors file.

    Raises:
        SourceError: it cannot be read, or its shapes do not fit each other.
    """
    header = read_header(path)
    latents = header.get(LATENTS)
    if latents is None:
        raise SourceError(f"{path}: has no tensor {LATENTS!r}", hint=_HINT)
    shape = tuple(latents.shape)
    if len(shape) != 4 or 0 in shape or latents.dtype not in _FLOATS:
        needed = "needed: floats [n, C, H, W]"
        raise SourceError(f"{path}: {LATENTS} is {latents.dtype} {list(shape)}, {needed}", hint=_HINT)
    flipped = header.get(FLIPPED)
    if flipped is not None and (tuple(flipped.shape) != shape or flipped.dtype not in _FLOATS):
        raise SourceError(
            f"{path}: {FLIPPED} is {flipped.dtype} {list(flipped.shape)}, needed: as {LATENTS}, {list(shape)}"
        )
    others = {name: tuple(entry.shape) for name, entry in header.items() if name not in (LATENTS, FLIPPED)}
    for name, other in others.items():
        if other[:1] != shape[:1]:
            raise SourceError(f"{path}: {name} is {list(other)}, and there are {shape[0]} latents")
    if LABELS in others and (len(others[LABELS]) != 1 or header[LABELS].dtype not in _INTEGERS):
        raise SourceError(
            f"{path}: {LABELS} is {header[LABELS].dtype} {list(others[LABELS])}, needed: whole numbers"
            f" [{shape[0]}]"
        )
    count, *item = shape
    return LatentPart(path, count, (item[0], item[1], item[2]), flipped is not None, others)


def _arrays(path: Path) -> list[LatentPart]:
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    features = [child for child in folders if child.name.endswith("features")]
    labels = [child for child in folders if child.name.endswith("labels")]
    if len(features) != 1 or len(labels) != 1:
        raise SourceError(f"{path}: holds neither safetensors files nor two folders", hint=_HINT)
    names = sorted(file.name for file in features[0].glob("*.npy"))
    named = {file.name for file in labels[0].glob("*.npy")}
    if not names:
        raise SourceError(f"{features[0]}: holds no .npy file", hint=_HINT)
    if set(names) != named:
        odd = sorted(set(names) ^ named)[0]
        raise SourceError(f"{path}: {odd} is in one of {features[0].name} and {labels[0].name} alone")
    return [_array(features[0] / name, labels[0] / name) for name in names]


def _array(path: Path, labels: Path) -> LatentPart:
    values, numbers = read_array(path), read_array(labels)
    shape = values.shape
    pairs = len(shape) == 5 and shape[1] == 2
    if not (len(shape) == 4 or pairs) or 0 in shape or values.dtype.kind != "f":
        needed = "needed: floats [n, C, H, W]"
        raise SourceError(f"{path}: is {values.dtype} {list(shape)}, {needed}", hint=_HINT)
    if numbers.shape != shape[:1] or numbers.dtype.kind not in "iu":
        raise SourceError(
            f"{labels}: is {numbers.dtype} {list(numbers.shape)}, needed: whole numbers [{shape[0]}]"
        )
    channels, height, width = shape[-3:]
    return LatentPart(path, shape[0], (channels, height, width), pairs, labels=labels)
