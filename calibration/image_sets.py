"""Sets of images of a classifier: read and decoded when they are asked for, never all of them in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SourceError
from ..runtime.hashes import digest
from .decoding import Unreadable, check_header, decode
from .image_files import Images, TensorFile
from .image_rows import row_pixels
from .preprocessing import Preprocessor

_DECODED_AT_MOST = 20_000
"""Images of a set that are decoded to see whether they can be; of more, the headers are read."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in a fixed order, with or without labels.

    Attributes:
        source: all images of the part.
        rows: which of them, in order.
        labels: [n] int64, or None.
        prepare: the preprocessing.
        key: content hash of the images, their order, their labels and the preprocessing.
        skipped: names of files that cannot be read, which are not in the set.
        copies: how many images are not in the set because they are held out for measuring.
        notes: what was assumed, and what could not be seen.
    """

    source: Images
    rows: tuple[int, ...]
    labels: Tensor | None
    prepare: Preprocessor = field(repr=False)
    key: str
    skipped: tuple[str, ...] = ()
    copies: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Decode and prepare some of the images.

        Args:
            indices: of images of the set, 0 to n - 1.

        Returns:
            [b, channels, H, W] float32.

        Raises:
            SourceError: an image can no longer be read.
        """
        rows = [self.rows[index] for index in indices]
        if isinstance(self.source, TensorFile):
            return self.prepare(row_pixels(self.source, rows, self.prepare.channels))
        try:
            return self.prepare([decode(self.source.paths[row], self.prepare.channels) for row in rows])
        except Unreadable as error:
            raise SourceError(str(error), hint="remove the file, or give images that can be read") from None

    def first(self, count: int) -> ImageSet:
        """Return the set of the first images."""
        labels = None if self.labels is None else self.labels[:count]
        key = digest([self.key, "first", count])
        return replace(self, rows=self.rows[:count], labels=labels, key=key)


@dataclass(frozen=True, eq=False)
class Pool:
    """Images that may be chosen for one purpose, in the order of the seed.

    Attributes:
        path: that the recipe named.
        source: all images of the part.
        order: rows of `source` that belong to the pool.
        labels: [len(source)] int64, or None.
        prepare: the preprocessing.
        strict: refuse an image that cannot be read instead of leaving it out.
        held_out: what is only measured on.
        key: content hash of all of it.
        copies: how many images are left out because they are held out for measuring.
        notes: what was assumed, and what could not be seen.
    """

    path: Path
    source: Images
    order: tuple[int, ...]
    labels: Tensor | None
    prepare: Preprocessor = field(repr=False)
    strict: bool
    held_out: bool
    key: str
    copies: int = 0
    notes: tuple[str, ...] = ()

    def first(self, count: int) -> ImageSet:
        """Return the first `count` images that can be read.

        Raises:
            SourceError: there are not so many; or one cannot be read, under `strict`.
        """
        rows, skipped = self._readable(count)
        if len(rows) < count:
            kind = "images are held out for measuring" if self.held_out else "images may be calibrated on"
            broken = f"; {len(skipped)} cannot be read" if skipped else ""
            broken += f"; {self.copies} are held out for measuring" if self.copies else ""
            raise SourceError(
                f"{self.path}: {len(rows)} {kind}{broken}; {count} are asked for",
                hint="give more images, or lower samples",
            )
        return self._set(rows, skipped)

    def all(self) -> ImageSet:
        """Return all images that can be read.

        Raises:
            SourceError: there is none; or one cannot be read, under `strict`.
        """
        return self._some(len(self.order))

    def check(self) -> None:
        """Read and prepare the first image that can be read; what serves nothing is so refused early.

        Raises:
            SourceError: there is none, or it does not fit the model.
        """
        self._some(1).pixels([0])

    def _some(self, count: int) -> ImageSet:
        """Return the first images that can be read, at most `count`, at least one."""
        rows, skipped = self._readable(count)
        if not rows:
            raise SourceError(
                f"{self.path}: none of its {len(skipped)} images can be read; the first is {skipped[0]}",
                hint="give images that can be read",
            )
        return self._set(rows, skipped)

    def _readable(self, count: int) -> tuple[list[int], list[str]]:
        if isinstance(self.source, TensorFile):
            return list(self.order[:count]), []
        thorough = count <= _DECODED_AT_MOST
        rows: list[int] = []
        skipped: list[str] = []
        for row in self.order:
            if len(rows) == count:
                break
            path = self.source.paths[row]
            try:
                check_header(path)
                if thorough:
                    decode(path, self.prepare.channels)
                rows.append(row)
            except Unreadable as error:
                if self.strict:
                    raise SourceError(
                        str(error), hint="remove the file, or leave out calibration.strict to skip it"
                    ) from None
                skipped.append(path.relative_to(self.source.root).as_posix())
        return rows, skipped

    def _set(self, rows: list[int], skipped: list[str]) -> ImageSet:
        labels = None if self.labels is None else self.labels[torch.tensor(rows, dtype=torch.int64)]
        key = digest([self.key, rows])
        return ImageSet(
            self.source, tuple(rows), labels, self.prepare, key, tuple(skipped), self.copies, self.notes
        )


@dataclass(frozen=True, eq=False)
class Pools:
    """Both parts.

    Attributes:
        train: for calibration and training.
        held_out: for measuring.
        notes: what was assumed about preprocessing and labels, and what could not be seen.
        trainings: place that a training names for itself -> what may be trained on; those known so far.
    """

    train: Pool
    held_out: Pool
    notes: tuple[str, ...]
    trainings: Mapping[Path, Pool] = field(default_factory=dict)
