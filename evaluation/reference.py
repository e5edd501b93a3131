"""What the original model does, recorded before a stage changes it; kept on disk by content hash.

A killed run finds the finished recording again. The folder is whole or absent, and memory holds one
recorded call at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..calibration.content import is_intact, read_index
from ..runtime.atomic import commit_folder, replace_folder, scratch_folder
from ..runtime.hashes import file_sha256
from .call_store import CallReader

VERSION = 3
"""Raise it when the same settings record something else."""

INDEX_FILE = "reference.json"
IMAGES_FILE = "images.safetensors"
CALLS = "calls"
LAYERS = "layers"


@dataclass
class Reference:
    """The recording of one original model.

    Attributes:
        folder: holds the index, the final images, the denoiser's calls and the layers' tensors.
        index: what the recorder noted; JSON values.
        temporary: keeps a folder that has no place in a cache alive as long as this object.
    """

    folder: Path
    index: dict[str, Any]
    temporary: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def images(self) -> dict[str, Tensor]:
        """Return the final samples, by the part of the evaluation that drew them."""
        return load_file(self.folder / IMAGES_FILE)

    def calls(self) -> CallReader:
        """Return the recorded denoiser calls."""
        return CallReader(self.folder / CALLS)

    def layers(self) -> dict[int, Path]:
        """Return index of a call -> folder with its layers' tensors, a file a block."""
        return {int(path.name): path for path in sorted((self.folder / LAYERS).glob("*"))}


def _paths(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.safetensors"))}


def _index(folder: Path) -> dict[str, Any] | None:
    """Return a recording's index, or None where its files are not those that it lists, byte by byte."""
    index = read_index(folder / INDEX_FILE)
    hashes = index.get("files") if index is not None else None
    paths = _paths(folder)
    if not isinstance(hashes, dict) or set(hashes) != set(paths):
        return None
    return index if all(is_intact(path, hashes[name]) for name, path in paths.items()) else None


def recorded(
    cache: Path | None, key: str, record: Callable[[Path], dict[str, Any]], *, fresh: bool = False
) -> Reference:
    """Return the recording with `key`, made now unless it is kept and undamaged.

    Args:
        cache: folder of recordings; None: a temporary folder that lives as long as the result.
        key: content hash.
        record: fills an empty folder and returns the index.
        fresh: make it now in any case; a kept one is replaced when the new one is finished.
    """

    def fill(folder: Path) -> dict[str, Any]:
        index = record(folder)
        # Through JSON, so that a recording made now and one found again read the same.
        hashes = {name: file_sha256(path) for name, path in _paths(folder).items()}
        text = json.dumps({**index, "files": hashes}, indent=1, sort_keys=True)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        again: dict[str, Any] = json.loads(text)
        return again

    if cache is None:
        temporary_folder = tempfile.TemporaryDirectory(prefix="compress-reference-")
        folder = Path(temporary_folder.name)
        return Reference(folder, fill(folder), temporary_folder)
    folder = cache / f"reference-{key[:32]}"
    if not fresh and folder.exists():
        kept = _index(folder)
        if kept is not None:
            return Reference(folder, kept)
    with scratch_folder(folder) as temporary:
        index = fill(temporary)
        if folder.exists():
            replace_folder(temporary, folder)
        else:
            commit_folder(temporary, folder)
    return Reference(folder, index)
