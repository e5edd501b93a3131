"""Images of a classifier: found, divided by seed, decoded one by one, prepared as the checkpoint says.

What is measured on is never calibrated or trained on: the parts of a folder, or a fifth that the seed
holds out. Images are read when they are asked for; never are all of them in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from .decoding import Unreadable, check_header, decode
from .image_files import LABELS, PIXELS, FileList, Images, Layout, TensorFile, find_images, held_out_count
from .inputs import image_place
from .labels import ClassNumbers, checked, class_names, class_numbers
from .preprocessing import Preprocessor, preprocessor_for
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

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
    """

    source: Images
    rows: tuple[int, ...]
    labels: Tensor | None
    prepare: Preprocessor = field(repr=False)
    key: str
    skipped: tuple[str, ...] = ()

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
            return self.prepare(_tensor_rows(self.source, rows, self.prepare.channels))
        try:
            return self.prepare([decode(self.source.paths[row], self.prepare.channels) for row in rows])
        except Unreadable as error:
            raise SourceError(str(error), hint="remove the file, or give images that can be read") from None

    def first(self, count: int) -> ImageSet:
        """Return the set of the first images."""
        labels = None if self.labels is None else self.labels[:count]
        key = _digest([self.key, "first", count])
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
    """

    path: Path
    source: Images
    order: tuple[int, ...]
    labels: Tensor | None
    prepare: Preprocessor = field(repr=False)
    strict: bool
    held_out: bool
    key: str

    def first(self, count: int) -> ImageSet:
        """Return the first `count` images that can be read.

        Raises:
            SourceError: there are not so many; or one cannot be read, under `strict`.
        """
        rows, skipped = self._readable(count)
        if len(rows) < count:
            kind = "images are held out for measuring" if self.held_out else "images may be calibrated on"
            broken = f"; {len(skipped)} cannot be read" if skipped else ""
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
        rows, skipped = self._readable(len(self.order))
        if not rows:
            raise SourceError(f"{self.path}: none of its {len(skipped)} images can be read")
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
        key = _digest([self.key, rows])
        return ImageSet(self.source, tuple(rows), labels, self.prepare, key, tuple(skipped))


@dataclass(frozen=True, eq=False)
class Pools:
    """Both parts.

    Attributes:
        train: for calibration and training.
        held_out: for measuring.
        notes: what was assumed about preprocessing and labels.
    """

    train: Pool
    held_out: Pool
    notes: tuple[str, ...]


def pools_of(model: OpenModel, settings: CalibrationSettings, seed: int) -> Pools:
    """Find and divide the images that a recipe names, or those that come with the model.

    Args:
        model: a classifier; decides labels and preprocessing.
        settings: `images`, `strict`.
        seed: of the run; decides orders and, where the place does not, what is held out.

    Raises:
        SourceError: there are none, or they do not fit the model.
    """
    path = image_place(settings, model.source.folder)
    if path is None:
        raise SourceError(
            f"{model.source.id}: a classifier is calibrated on images, and the recipe names none",
            hint="add `calibration: {images: FOLDER}`",
        )
    return _divide(model, find_images(path), settings.strict, seed)


def training_images(
    model: OpenModel, path: Path | None, settings: CalibrationSettings, seed: int
) -> ImageSet:
    """Return all images of a place that may be trained on.

    Args:
        model: a classifier.
        path: a place of its own for the training; None, or the place of the calibration: what that has
            apart from the held-out images.
        settings: of the calibration.
        seed: of the run.

    Raises:
        SourceError: there are none, or they do not fit the model.
    """
    own = image_place(settings, model.source.folder)
    if path is None or (own is not None and path.resolve() == own.resolve()):
        return pools_of(model, settings, seed).train.all()
    layout = find_images(path)
    if layout.held_out is None:
        # A place that is only trained on: nothing is measured on it, so all of it is of use.
        return _pool(model, layout, layout.train, settings.strict, seed).all()
    return _divide(model, layout, settings.strict, seed).train.all()


def _divide(model: OpenModel, layout: Layout, strict: bool, seed: int) -> Pools:
    train = _pool(model, layout, layout.train, strict, seed)
    if layout.held_out is not None:
        held_out = replace(_pool(model, layout, layout.held_out, strict, seed), held_out=True)
    else:
        if len(train.order) < 2:
            raise SourceError(f"{layout.path}: one image; some are calibrated on, and others measured on")
        order, cut = train.order, len(train.order) - held_out_count(len(train.order))
        train, held_out = (
            replace(train, order=part, key=_digest([train.key, name]), held_out=name == "held out")
            for name, part in (("train", order[:cut]), ("held out", order[cut:]))
        )
    notes = (train.prepare.note, _numbers(layout, model).note)
    return Pools(train, held_out, tuple(note for note in notes if note))


def _pool(model: OpenModel, layout: Layout, source: Images, strict: bool, seed: int) -> Pool:
    """Return all images of a part, in the order of the seed."""
    prepare = preprocessor_for(model)
    labels = _labels(source, layout, model)
    order = torch.randperm(len(source), generator=generator_for(seed, "images")).tolist()
    numbers = None if labels is None else labels.tolist()
    key = _digest([layout.fingerprint(), source is layout.train, seed, numbers, prepare.key])
    return Pool(layout.path, source, tuple(order), labels, prepare, strict, False, key)


def _numbers(layout: Layout, model: OpenModel) -> ClassNumbers:
    parts = [part for part in (layout.train, layout.held_out) if isinstance(part, FileList) and part.labels]
    names = sorted({name for part in parts for name in part.classes})
    return class_numbers(names, model.config, layout.path) if names else ClassNumbers({})


def _labels(source: Images, layout: Layout, model: OpenModel) -> Tensor | None:
    """Return the classes of all images of a part: [n] int64."""
    if isinstance(source, FileList):
        if source.labels is None:
            return None
        numbers = _numbers(layout, model).numbers
        return torch.tensor([numbers[name] for name in source.labels], dtype=torch.int64)
    if not source.labelled:
        return None
    with safe_open(source.path, framework="pt") as file:
        labels: Tensor = file.get_tensor(LABELS).long()
    classes = len(class_names(model.config))
    for extreme in (int(labels.min()), int(labels.max())):
        checked(extreme, classes, source.path)
    return labels


def _tensor_rows(source: TensorFile, rows: Sequence[int], channels: int) -> list[np.ndarray]:
    """Read rows of the tensor `pixels`, each [channels, height, width] uint8."""
    if source.channels > channels:
        raise SourceError(
            f"{source.path}: the images have {source.channels} channels, the model takes {channels}",
            hint="convert them before",
        )
    with safe_open(source.path, framework="np") as file:
        pixels = file.get_slice(PIXELS)
        images = [pixels[row : row + 1][0] for row in rows]
    planes = [image.transpose(2, 0, 1) if image.ndim == 3 else image[None] for image in images]
    return [np.repeat(plane, channels // source.channels, axis=0) for plane in planes]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
