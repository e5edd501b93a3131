"""Latents that were made for training, on disk under the hash of what they depend on."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..models.base import OpenModel
from ..runtime.atomic import atomic_file, locked_folder
from ..runtime.hashes import digest, file_sha256
from .content import is_intact, read_index, recording_folder, write_index
from .latent_files import latent_table
from .latents import Given, LatentSet, check_shape

_INDEX = "index.json"
_PER_FILE = 512
"""Items of a file; a kill costs at most as many."""


class LatentCache:
    """Files of latents under one key, whole or absent; the hashes of those that are whole in an index.

    Args:
        cache: of recordings; None: a temporary one.
        key: content hash.
        count: items in all.
    """

    def __init__(self, cache: Path | None, key: str, count: int) -> None:
        self.folder, self._alive = recording_folder(cache, key)
        self._key = key
        self._rows = {
            f"latents-{start // _PER_FILE:05d}.safetensors": range(start, min(start + _PER_FILE, count))
            for start in range(0, count, _PER_FILE)
        }
        index = read_index(self.folder / _INDEX) or {}
        self._hashes = {name: value for name, value in index.items() if is_intact(self.folder / name, value)}

    def missing(self, name: str) -> bool:
        """Tell whether a file is still to be made."""
        return name not in self._hashes

    def left(self) -> list[tuple[str, range]]:
        """Return the files of latents that are still to be made, with the items of each."""
        return [(name, rows) for name, rows in self._rows.items() if self.missing(name)]

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Keep one file; what other runs have kept meanwhile stays in the index."""
        with locked_folder(self.folder):
            with atomic_file(self.folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
                self._hashes[name] = file_sha256(temporary)
            index = read_index(self.folder / _INDEX) or self._hashes
            write_index(self.folder / _INDEX, {**index, name: self._hashes[name]})

    def latents(self, model: OpenModel, given: Given, mirror: str | None) -> LatentSet:
        """Return all of them; the files live as long as that."""
        parts = tuple(latent_table(self.folder / name) for name in self._rows)
        check_shape(model, parts[0].shape, parts[0].path)
        return LatentSet(parts, given, digest([self._key, mirror]), mirror, keeper=self._alive)
