"""Latents that a denoiser is trained on, with what each is conditioned on; read when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SourceError
from ..models.base import OpenModel
from ..models.latent_sizes import check_latents
from ..runtime.hashes import digest
from .conditions import (
    ClassConditions,
    Conditions,
    PromptConditions,
    check_widths,
    embedding_keys,
    size_entries,
)
from .latent_files import FLIPPED, LABELS, LATENTS, LatentPart, find_latents, fingerprint, read_array
from .prompts import ADDED

Given = Callable[[Sequence[int]], dict[str, Any]]
"""From items to the keyword arguments that the denoiser gets beside latents and timestep."""
KEPT_BYTES = 512 * 2**20
"""Latents up to this size, as float32, stay in memory once they are read."""


@dataclass(frozen=True, eq=False)
class LatentSet:
    """Clean latents in a fixed order, each with its conditions.

    Attributes:
        parts: the files, one after the other.
        conditions: of items; see `Given`.
        key: content hash of the latents, of their conditions, and of whether they are mirrored.
        mirror: how half of them are mirrored: "stored" beside the others, "pixels" turned around here, or
            None, not at all.
        empty: argument of the denoiser -> [1, ...] of the empty prompt, which takes the place of some
            captions in training; empty where none are dropped.
        keeper: keeps a temporary folder with the files alive as long as this object.
    """

    parts: tuple[LatentPart, ...]
    conditions: Given = field(repr=False)
    key: str
    mirror: str | None = None
    keeper: Any = None
    empty: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        """Return the number of items; a mirrored one is none of its own."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return ends_of(self.parts)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an item."""
        return self.parts[0].shape

    def batch(
        self, indices: Sequence[int], generator: torch.Generator | Sequence[torch.Generator]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return some items, each of them mirrored or not.

        Args:
            indices: of items, 0 to n - 1.
            generator: on the CPU, for all items in turn or one for each; one number of it is taken for
                each item, whether or not any is mirrored.

        Returns:
            [b, C, H, W] float32, and keyword arguments of the denoiser with b rows each; on the CPU.

        Raises:
            SourceError: a file cannot be read any more, or a value is not finite.
        """
        several = [generator] * len(indices) if isinstance(generator, torch.Generator) else generator
        turned = torch.tensor([float(torch.rand((), generator=one)) < 0.5 for one in several])
        items = [
            self._item(index, mirrored) for index, mirrored in zip(indices, turned.tolist(), strict=True)
        ]
        return torch.stack(items), self.conditions(indices)

    def _item(self, index: int, mirrored: bool) -> Tensor:
        number, row = place_of(self._ends, index)
        name = FLIPPED if mirrored and self.mirror == "stored" else LATENTS
        item = self._row(number, name, row)
        if not item.isfinite().all():
            raise SourceError(f"{self.parts[number].path}: {name} of item {row} are not finite")
        return item.flip(-1) if mirrored and self.mirror == "pixels" else item

    def _row(self, number: int, name: str, row: int) -> Tensor:
        part = self.parts[number]
        if number not in self._kept and self._fits():
            names = [LATENTS, FLIPPED] if self.mirror == "stored" else [LATENTS]
            self._kept[number] = {one: read_rows(part, one, slice(None)) for one in names}
        if number in self._kept:
            return self._kept[number][name][row]
        return read_rows(part, name, slice(row, row + 1))[0]

    def _fits(self) -> bool:
        channels, height, width = self.shape
        copies = 2 if self.mirror == "stored" else 1
        return 4 * copies * len(self) * channels * height * width <= KEPT_BYTES


def ends_of(parts: Sequence[LatentPart]) -> tuple[int, ...]:
    """Return how many items there are up to the end of each part."""
    return tuple(accumulate(part.count for part in parts))


def place_of(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Return (part, row in it) of an item."""
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


def read_rows(part: LatentPart, name: str, rows: slice) -> Tensor:
    """Return rows of a tensor of a file: latents float32, labels int64, others as they are.

    Raises:
        SourceError: it cannot be read.
    """
    if part.labels is not None:
        if name == LABELS:
            return torch.from_numpy(read_array(part.labels)[rows].astype(np.int64))
        values = read_array(part.path)
        chosen = values[rows, int(name == FLIPPED)] if part.flipped else values[rows]
        return torch.from_numpy(chosen.astype(np.float32))
    try:
        with safe_open(part.path, framework="pt") as file:
            found: Tensor = file.get_slice(name)[rows]
    except OSError as error:
        raise SourceError(f"{part.path}: cannot be read: {error}") from None
    if name == LABELS:
        return found.long()
    return found.float() if name in (LATENTS, FLIPPED) else found


def stored_latents(
    model: OpenModel, path: Path, flip: bool | None, guidance: float | None = None
) -> LatentSet:
    """Open latents that lie on disk; see `latent_files`.

    Args:
        model: the denoiser; its config says what fits.
        path: of the recipe.
        flip: of the recipe; None: where mirrored ones are there.
        guidance: what the model is told of it; see `conditions.told_guidance`.

    Raises:
        SourceError: they do not fit the model, conditions are missing, or mirrored ones are asked for that
            are not there.
    """
    parts = find_latents(path)
    check_shape(model, parts[0].shape, parts[0].path)
    without = [part for part in parts if not part.flipped]
    if flip and without:
        raise SourceError(
            f"{without[0].path}: holds no mirrored latents, and calibration.data.flip asks for them",
            hint="leave out flip, or store them too; mirroring a latent does not mirror its image",
        )
    mirror = "stored" if flip is not False and not without else None
    given = _labels(model, parts) if model.family.name == "dit" else _embeddings(model, parts, guidance)
    content = ["latents", fingerprint(parts), mirror, *([] if guidance is None else [guidance])]
    return LatentSet(tuple(parts), given, digest(content), mirror)


def check_shape(model: OpenModel, shape: tuple[int, ...], place: Path) -> None:
    """Refuse items that the model cannot see.

    Raises:
        SourceError: they have other channels or another size.
    """
    check_latents(model.config, shape, place, model.source.id)


def given_by(conditions: Conditions) -> Given:
    """Return the arguments of any items, from the conditions of all of them."""

    def rows(indices: Sequence[int]) -> dict[str, Any]:
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        if isinstance(conditions, ClassConditions):
            picked: Conditions = replace(conditions, labels=conditions.labels[chosen])
        else:
            assert isinstance(conditions, PromptConditions)
            picked = replace(conditions, index=conditions.index[chosen])
        return picked.inputs(0, len(chosen), guided=False)

    return rows


def checked_labels(model: OpenModel, labels: Tensor, place: Path) -> ClassConditions:
    """Return labels as conditions.

    Raises:
        SourceError: the model has no such class.
    """
    classes = int(model.config["num_embeds_ada_norm"])
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise SourceError(
            f"{place}: the label {int(wrong[0])} is out of range; the model has {classes} classes",
            hint=f"labels are 0 to {classes - 1}",
        )
    return ClassConditions(labels, null=classes)


def _labels(model: OpenModel, parts: Sequence[LatentPart]) -> Given:
    for part in parts:
        if part.labels is None and LABELS not in part.conditions:
            raise SourceError(f"{part.path}: has no tensor {LABELS!r}, and the model is class-conditional")
    _refuse_unused(parts, {LABELS})
    read = [read_rows(part, LABELS, slice(None)) for part in parts]
    try:
        return given_by(checked_labels(model, torch.cat(read), parts[0].path.parent))
    except SourceError:
        for part, labels in zip(parts, read, strict=True):  # not before: there may be a million files
            checked_labels(model, labels, part.labels or part.path)
        raise


def _embeddings(model: OpenModel, parts: Sequence[LatentPart], guidance: float | None) -> Given:
    """Read embeddings row by row: of many items they are larger than the latents."""
    keys = embedding_keys(model)
    for part in parts:
        missing = [key for key in keys.values() if key not in part.conditions]
        if missing:
            raise SourceError(
                f"{part.path}: no tensor {missing[0]!r}", hint=f"needed: {', '.join(keys.values())}"
            )
    _refuse_unused(parts, set(keys.values()))
    for part in parts:
        check_widths(model, {name: part.conditions[key] for name, key in keys.items()}, part.path)
    sizes, ends = size_entries(model), ends_of(parts)

    def rows(indices: Sequence[int]) -> dict[str, Any]:
        places = [place_of(ends, index) for index in indices]
        inputs: dict[str, Any] = {}
        for name, key in keys.items():
            outer, _, inner = name.rpartition("/")
            target = inputs.setdefault(outer, {}) if outer else inputs
            target[inner] = torch.stack([_embedding(parts[number], key, row) for number, row in places])
        if sizes is not None:
            inputs.setdefault(ADDED, {}).update(sizes(len(indices)))
        if guidance is not None:
            inputs["guidance"] = torch.full((len(indices),), guidance)
        return inputs

    return rows


def _embedding(part: LatentPart, key: str, row: int) -> Tensor:
    """Return what one item is conditioned on.

    Raises:
        SourceError: it cannot be read, a value is not finite, or it is of whole numbers and no mask.
    """
    found = read_rows(part, key, slice(row, row + 1))[0]
    if not (found.is_floating_point() or "mask" in key):
        kind = str(found.dtype).removeprefix("torch.")
        raise SourceError(f"{part.path}: {key} is {kind}, needed: numbers with a fraction")
    if not found.isfinite().all():
        raise SourceError(f"{part.path}: {key} of item {row} are not finite")
    return found


def _refuse_unused(parts: Sequence[LatentPart], used: set[str]) -> None:
    for part in parts:
        unused = sorted(set(part.conditions) - used)
        if unused:
            raise SourceError(
                f"{part.path}: the tensor {unused[0]!r} is none that the model is conditioned on",
                hint=f"it takes {', '.join(sorted(used))}",
            )
