"""What slimming has decided and measured so far, on disk: a killed run takes it over."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....progress import Progress
from ....runtime.atomic import atomic_file
from ....runtime.hashes import digest
from .choosing import Kept


class Records:
    """Small JSON files of one stage, each whole or absent, and found again by what they depend on.

    Args:
        folder: of the stage.
        key: content hash of all that the stage's result depends on.
        progress: warned of files that are damaged; what they hold is done again.
    """

    def __init__(self, folder: Path, key: str, progress: Progress) -> None:
        self._folder, self._key, self._progress = folder, key, progress

    def read(self, name: str) -> dict[str, Any] | None:
        """Return what was written under a name; None: nothing, or nothing that can be used."""
        path = self._folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            value: dict[str, Any] = found["value"]
            whole = found["sha256"] == digest([self._key, name, value])
        except (OSError, ValueError, TypeError, LookupError):
            whole = False
        if not whole:
            self._progress.warn(f"{path}: damaged, or of another stage; it is made again")
            return None
        return value

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write JSON values under a name, in the place of those before."""
        # A tuple is a list once it was written, and hashes alike.
        told = {"value": value, "sha256": digest([self._key, name, value])}
        with atomic_file(self._folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(told, allow_nan=False) + "\n", encoding="utf-8")

    def read_kept(self, name: str) -> Kept | None:
        """Return a choice of channels; see `read`."""
        found = self.read(name)
        if found is None:
            return None
        embedding = found["embedding"]
        return Kept(
            None if embedding is None else _indices(embedding),
            tuple(map(_indices, found["attention"])),
            tuple(map(_indices, found["inner"])),
        )

    def write_kept(self, name: str, kept: Kept) -> None:
        """Write a choice of channels before it is carried out."""
        self.write(name, kept_json(kept))


def kept_json(kept: Kept) -> dict[str, Any]:
    """Return a choice of channels as JSON values."""
    return {
        "embedding": None if kept.embedding is None else kept.embedding.tolist(),
        "attention": [item.tolist() for item in kept.attention],
        "inner": [item.tolist() for item in kept.inner],
    }


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
