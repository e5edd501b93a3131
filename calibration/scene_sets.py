"""Sets of images for a model that segments: found, divided, read one by one when they are asked for.

What is measured on is never calibrated or trained on: the parts of a place, or a fifth that the seed holds
out, of images with masks and of those without. That goes by contents: a copy under another name is left
out, too. Never are all images in memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from .decoding import Unreadable
from .holding_out import hold_out
from .scene_files import SceneFiles, SceneLayout, choice_count, equal_scenes, held_out_counts
from .scene_preprocessing import ScenePreprocessor, scene_preprocessor_for
from .scene_reading import look_at, read_image, read_masks, readers
from .scenes import Annotation, Scene
from .seeds import generator_for

_DECODED_AT_MOST = 20_000
"""Images of a pool that are decoded to see whether they can be; of more, the headers are read."""
_AGAIN = "remove the file, or give images that can be read"


@dataclass(frozen=True, eq=False)
class SceneSet:
    """Images in a fixed order. Implements `scenes.Scenes`.

    Attributes:
        files: all images of the part.
        rows: which of them, in order.
        masks: how many masks each has.
        prepare: the preprocessing.
        key: content hash of images, masks, order and preprocessing.
        skipped: names of files that cannot be read, which are not in the set.
        copies: how many images are not in the set because they are held out for measuring.
        notes: what was assumed.
    """

    files: SceneFiles
    rows: tuple[int, ...]
    masks: tuple[int, ...]
    prepare: ScenePreprocessor = field(repr=False)
    key: str
    skipped: tuple[str, ...] = ()
    copies: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """What each image is called: its path below the place."""
        return tuple(self.files.images[row].name for row in self.rows)

    @property
    def annotated(self) -> bool:
        """Whether every image has at least one mask."""
        return all(self.masks)

    def scene(self, index: int) -> Scene:
        """Read and prepare one image.

        Raises:
            SourceError: it can no longer be read, or does not fit the model.
        """
        return self.prepare(self.image(index))

    def image(self, index: int) -> np.ndarray:
        """Return one image, upright: [height, width, 3] uint8.

        Raises:
            SourceError: it can no longer be read.
        """
        try:
            return read_image(self.files, self.rows[index])
        except Unreadable as error:
            raise SourceError(str(error), hint=_AGAIN) from None

    def annotations(self, index: int) -> list[Annotation]:
        """Return the masks of one image, the first of them; see `mask_files`.

        Raises:
            SourceError: they can no longer be read.
        """
        try:
            outlines = read_masks(self.files, self.rows[index])
        except Unreadable as error:
            raise SourceError(str(error), hint=_AGAIN) from None
        drawn = ((outline, outline.mask()) for outline in outlines)
        return [Annotation(mask, outline.click(mask)) for outline, mask in drawn]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Return some images as the model takes them: [b, channels, S, S] float32.

        Raises:
            SourceError: see `scene`.
        """
        return torch.stack([self.scene(index).pixels for index in indices])

    def first(self, count: int) -> SceneSet:
        """Return the set of the first images."""
        return self.some(range(min(count, len(self))))

    def some(self, indices: Sequence[int]) -> SceneSet:
        """Return the set of some of the images, in the order of the indices."""
        rows = tuple(self.rows[index] for index in indices)
        masks = tuple(self.masks[index] for index in indices)
        return replace(self, rows=rows, masks=masks, key=digest([self.key, "some", list(indices)]))


@dataclass(frozen=True, eq=False)
class ScenePool:
    """Images that may be chosen for one purpose, in the order of the seed.

    Attributes:
        path: that the recipe named.
        files: all images of the part.
        order: rows of `files` that belong to the pool.
        prepare: the preprocessing.
        strict: refuse an image that cannot be read instead of leaving it out.
        held_out: what is only measured on.
        key: content hash of all of it.
        copies: how many images are left out because they are held out for measuring.
        notes: what was assumed.
    """

    path: Path
    files: SceneFiles
    order: tuple[int, ...]
    prepare: ScenePreprocessor = field(repr=False)
    strict: bool
    held_out: bool
    key: str
    copies: int = 0
    notes: tuple[str, ...] = ()
    _seen: dict[int, int | None] = field(default_factory=dict, repr=False)
    """Row -> number of masks, or None: cannot be read. Each is looked at once."""
    _problems: list[str] = field(default_factory=list, repr=False)
    """What is wrong with those that cannot be read."""

    def first(self, count: int, *, annotated: bool = False) -> SceneSet:
        """Return the first `count` images that can be read.

        Args:
            count: how many.
            annotated: those with masks alone.

        Raises:
            SourceError: there are not so many; or one cannot be read, under `strict`.
        """
        found = self._readable(count, annotated)
        if len(found) < count:
            kind = "with masks " if annotated else ""
            what = "are held out for measuring" if self.held_out else "may be calibrated on"
            broken = f"; {len(found.skipped)} cannot be read" if found.skipped else ""
            broken += f"; {self.copies} are held out for measuring" if self.copies else ""
            first = f"; of those that cannot be read, one is {min(self._problems)}" if self._problems else ""
            raise SourceError(
                f"{self.path}: {len(found)} images {kind}{what}{broken}; {count} are asked for{first}",
                hint="give more images, or lower samples",
            )
        return found

    def all(self) -> SceneSet:
        """Return all images that can be read.

        Raises:
            SourceError: there is none; or one cannot be read, under `strict`.
        """
        found = self._readable(len(self.order), False)
        if not len(found):
            raise SourceError(
                f"{self.path}: none of its {len(self.order)} images can be read; one is"
                f" {min(self._problems, default='')}",
                hint="give images that can be read",
            )
        return found

    def _readable(self, count: int, annotated: bool) -> SceneSet:
        rows: list[int] = []
        masks: list[int] = []
        skipped: list[str] = []
        offered = [row for row in self.order if self.files.masks[row] is not None or not annotated]
        with readers() as pool:
            while offered and len(rows) < count:
                # Each gives one image at the most, so none is looked at in vain.
                missing = count - len(rows)
                part, offered = offered[:missing], offered[missing:]
                for row, found in zip(part, pool.map(self._look, part), strict=True):
                    if found is None:
                        skipped.append(self.files.images[row].name)
                    elif found or not annotated:
                        rows.append(row)
                        masks.append(found)
        key = digest([self.key, rows])
        return SceneSet(
            self.files, tuple(rows), tuple(masks), self.prepare, key, tuple(skipped), self.copies, self.notes
        )

    def _look(self, row: int) -> int | None:
        """Return how many masks an image has; None: it, or its masks, cannot be read."""
        if row not in self._seen:
            try:
                self._seen[row] = look_at(self.files, row, decode=len(self.order) <= _DECODED_AT_MOST)
            except Unreadable as error:
                if self.strict:
                    raise SourceError(
                        str(error), hint="remove the file, or leave out calibration.strict to skip it"
                    ) from None
                self._seen[row] = None
                self._problems.append(str(error))
        return self._seen[row]


@dataclass(frozen=True, eq=False)
class ScenePools:
    """Both parts.

    Attributes:
        train: for calibration and training.
        held_out: for measuring.
        notes: what was assumed about preprocessing.
    """

    train: ScenePool
    held_out: ScenePool
    notes: tuple[str, ...]


def divide(model: OpenModel, layout: SceneLayout, strict: bool, seed: int) -> ScenePools:
    """Divide the images of a place into what is learned from and what is measured on.

    Args:
        model: a segmenter; decides the preprocessing.
        layout: of `find_scenes`.
        strict: refuse images that cannot be read.
        seed: decides orders and, where the place does not, what is held out.

    Raises:
        SourceError: there are too few, or nothing is left to learn from.
    """
    prepare = scene_preprocessor_for(model)
    content = digest([layout.fingerprint(), seed, prepare.key])
    train = _pool(layout, layout.train, prepare, strict, seed, content)
    if layout.held_out is None:
        train, held_out = _parted(train)
    else:
        held_out = replace(_pool(layout, layout.held_out, prepare, strict, seed, content), held_out=True)
        train = _without(train, held_out)
    return ScenePools(train, held_out, train.notes)


def split_for_choice(scenes: SceneSet, count: int, seed: int) -> tuple[SceneSet, SceneSet]:
    """Set different images apart by which epochs are compared: no equal one is left among the others.

    They have masks where there are so many of these, so that masks can be compared.

    Args:
        scenes: to divide.
        count: how many are wanted; at most a fifth of the different images is taken, and at least one.
        seed: of the run.

    Returns:
        What is left to train on, and the images of the choice.

    Raises:
        SourceError: nothing would be left to train on.
    """
    (by_row,) = equal_scenes(scenes.files)
    held = [by_row[row] for row in scenes.rows]
    different = len(set(held))
    if different < 2:
        raise SourceError(
            f"{scenes.files.root}: {different} different image to train on; some are trained on, and others"
            " choose the epoch",
            hint="give more images",
        )
    wanted = choice_count(different, count)
    order = torch.randperm(len(scenes), generator=generator_for(seed, "choice images")).tolist()
    with_masks = [index for index in order if scenes.masks[index]]
    candidates = [_one_of_each(indices, held) for indices in (with_masks, order)]
    chosen = next(indices for indices in candidates if len(indices) >= wanted)[:wanted]
    apart = {held[index] for index in chosen}
    rest = [index for index in range(len(scenes)) if held[index] not in apart]
    return scenes.some(rest), scenes.some(sorted(chosen))


def _one_of_each(indices: Sequence[int], contents: Sequence[Hashable]) -> list[int]:
    """Return the first index of every content."""
    return list({contents[index]: index for index in reversed(indices)}.values())


def _pool(
    layout: SceneLayout,
    files: SceneFiles,
    prepare: ScenePreprocessor,
    strict: bool,
    seed: int,
    content: str,
) -> ScenePool:
    """Return all images of a part, in the order of the seed."""
    order = torch.randperm(len(files), generator=generator_for(seed, "images")).tolist()
    notes = (prepare.note,) if prepare.note else ()
    key = digest([content, files is layout.train])
    return ScenePool(layout.path, files, tuple(order), prepare, strict, False, key, notes=notes)


def _parted(pool: ScenePool) -> tuple[ScenePool, ScenePool]:
    """Divide a pool; equal images stay together."""
    (held,) = equal_scenes(pool.files)
    if len({held[row] for row in pool.order}) < 2:
        raise SourceError(
            f"{pool.path}: {len(pool.order)} image(s), none different from another; some are calibrated on,"
            " and others measured on",
            hint="give more images",
        )
    with_masks = {held[row] for row in pool.order if pool.files.masked[row]}
    masked = [row for row in pool.order if held[row] in with_masks]
    others = [row for row in pool.order if held[row] not in with_masks]
    chosen: set[int] = set()
    for rows, wanted in zip((masked, others), held_out_counts(len(masked), len(others)), strict=True):
        chosen |= hold_out(rows, held, wanted)
    parts = [tuple(row for row in pool.order if (row in chosen) == out) for out in (False, True)]
    train, held_out = (
        replace(pool, order=rows, key=digest([pool.key, name, rows]), held_out=name == "held out")
        for name, rows in zip(("train", "held out"), parts, strict=True)
    )
    return train, held_out


def _without(pool: ScenePool, held_out: ScenePool) -> ScenePool:
    """Return a pool without the images that are held out, under whatever name they are in it."""
    ours, theirs = equal_scenes(pool.files, held_out.files)
    seen = {theirs[row] for row in held_out.order}
    order = tuple(row for row in pool.order if ours[row] not in seen)
    copies = len(pool.order) - len(order)
    if not copies:
        return pool
    if not order:
        raise SourceError(
            f"{pool.path}: all of its {copies} images are also held out for measuring",
            hint="learn from other images than those that are measured on",
        )
    return replace(
        pool, order=order, key=digest([pool.key, "without what is held out", order]), copies=copies
    )
