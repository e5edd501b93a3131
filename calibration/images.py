"""Images of a classifier: found, divided by seed, decoded one by one, prepared as the checkpoint says.

What is measured on is never calibrated or trained on: the parts of a folder, or a fifth that the seed
holds out. That goes by contents: a copy under another name, or in another place, is left out, too. Images are
read when they are asked for; never are all of them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..runtime.hashes import digest
from .holding_out import hold_out
from .image_contents import comparable, contents
from .image_files import (
    EMPTY_HINT,
    FileList,
    Images,
    Layout,
    find_images,
    held_out_count,
)
from .image_rows import row_labels
from .image_sets import ImageSet, Pool, Pools
from .inputs import image_place
from .labels import ClassNumbers, class_names, class_numbers
from .preprocessing import Preprocessor, preprocessor_for
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings


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


def training_images(model: OpenModel, path: Path, pools: Pools | None, seed: int) -> ImageSet:
    """Return all images of a place that may be trained on; see `training_pool`.

    Raises:
        SourceError: there are none, or they do not fit the model.
    """
    return training_pool(model, path, pools, seed).all()


def training_pool(
    model: OpenModel, path: Path, pools: Pools | None, seed: int, layout: Layout | None = None
) -> Pool:
    """Find what of a place may be trained on: nothing that is held out, by whatever name.

    Args:
        model: a classifier.
        path: of the training; where it is that of the calibration: what that has apart from the held-out
            images.
        pools: of the calibration; None: there are none, and nothing is measured.
        seed: of the run.
        layout: what is at `path`, where that was found already.

    Raises:
        SourceError: there are none, or they do not fit the model.
    """
    if pools is not None and path in pools.trainings:
        return pools.trainings[path]
    if pools is not None and path.resolve() == pools.train.path.resolve():
        return pools.train
    layout, strict = layout or find_images(path), pools is not None and pools.train.strict
    if layout.held_out is None:
        # A place that is only trained on: nothing is measured on it, so all of it is of use.
        pool = _Maker.of(model, layout, strict, seed).pool(layout.train)
    else:
        pool = _divide(model, layout, strict, seed).train
    return pool if pools is None else _without(pool, pools.held_out)


def _divide(model: OpenModel, layout: Layout, strict: bool, seed: int) -> Pools:
    maker = _Maker.of(model, layout, strict, seed)
    train = maker.pool(layout.train)
    if layout.held_out is None:
        train, held_out = _parted(train)
    else:
        held_out = replace(maker.pool(layout.held_out), held_out=True)
        train = _without(train, held_out)
    return Pools(train, held_out, train.notes)


@dataclass(frozen=True, eq=False)
class _Maker:
    """What both parts of a place have in common, found out once."""

    layout: Layout
    fingerprint: str
    prepare: Preprocessor = field(repr=False)
    numbers: ClassNumbers
    classes: int
    strict: bool
    seed: int

    @classmethod
    def of(cls, model: OpenModel, layout: Layout, strict: bool, seed: int) -> _Maker:
        if strict and layout.emptiness:
            raise SourceError(layout.emptiness, hint=EMPTY_HINT)
        names = layout.classes
        numbers = class_numbers(names, model.config, layout.path) if names else ClassNumbers({})
        classes = len(class_names(model.config))
        return cls(layout, layout.fingerprint(), preprocessor_for(model), numbers, classes, strict, seed)

    def pool(self, source: Images) -> Pool:
        """Return all images of a part, in the order of the seed."""
        labels = labels_of(source, self.numbers.numbers, self.classes)
        order = torch.randperm(len(source), generator=generator_for(self.seed, "images")).tolist()
        values = None if labels is None else labels.tolist()
        key = digest([self.fingerprint, source is self.layout.train, self.seed, values, self.prepare.key])
        notes = tuple(note for note in (self.prepare.note, self.numbers.note, self.layout.emptiness) if note)
        return Pool(
            self.layout.path, source, tuple(order), labels, self.prepare, self.strict, False, key, notes=notes
        )


def _parted(pool: Pool) -> tuple[Pool, Pool]:
    """Divide a pool; equal images stay together, so not more than a fifth is held out, and perhaps less."""
    order = pool.order
    if len(order) < 2:
        raise SourceError(f"{pool.path}: one image; some are calibrated on, and others measured on")
    (held,) = contents(pool.source)
    if len({held[row] for row in order}) < 2:
        raise SourceError(
            f"{pool.path}: its {len(order)} images are all equal; some are calibrated on, and others measured"
            " on",
            hint="give different images",
        )
    chosen = hold_out(order, held, held_out_count(len(order)))
    parts = {
        "train": tuple(row for row in order if row not in chosen),
        "held out": tuple(row for row in order if row in chosen),
    }
    train, held_out = (
        replace(pool, order=rows, key=digest([pool.key, name, rows]), held_out=name == "held out")
        for name, rows in parts.items()
    )
    return train, held_out


def _without(pool: Pool, held_out: Pool) -> Pool:
    """Return a pool without the images that are held out, under whatever name they are in it.

    Raises:
        SourceError: nothing is left.
    """
    if not comparable(pool.source, held_out.source):
        note = (
            f"{pool.path}: files cannot be compared with rows of a tensor, so images that are also held out"
            f" ({held_out.path}) are not found"
        )
        return replace(pool, notes=(*pool.notes, note))
    ours, theirs = contents(pool.source, held_out.source)
    seen = {theirs[row] for row in held_out.order}
    order = tuple(row for row in pool.order if ours[row] not in seen)
    copies = len(pool.order) - len(order)
    if not copies:
        return pool
    if not order:
        raise SourceError(
            f"{pool.path}: all of its {copies} images are also held out for measuring ({held_out.path})",
            hint="learn from other images than those that are measured on",
        )
    key = digest([pool.key, "without what is held out", order])
    return replace(pool, order=order, key=key, copies=pool.copies + copies)


def labels_of(source: Images, numbers: Mapping[str, int], classes: int) -> Tensor | None:
    """Return the classes of all images of a part, [n] int64; None: nothing says them.

    Args:
        source: the images.
        numbers: what their labels are called -> class.
        classes: of the model.

    Raises:
        SourceError: a label is none of them.
    """
    if isinstance(source, FileList):
        if source.labels is None:
            return None
        return torch.tensor([numbers[name] for name in source.labels], dtype=torch.int64)
    if not source.labelled:
        return None
    return torch.from_numpy(row_labels(source, classes))
