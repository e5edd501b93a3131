"""What the original model does, recorded before a stage changes it; kept on disk by content hash.

A killed run finds the finished recording again. The folder is whole or absent, and memory holds one
recorded call at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.base import OpenModel
from ..runtime.atomic import atomic_folder, temporary_beside
from .call_store import CallReader

VERSION = 1
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
        """Return index of a call -> file with its layers' tensors."""
        return {int(path.stem): path for path in sorted((self.folder / LAYERS).glob("*.safetensors"))}


def content_key(model: OpenModel, settings: Mapping[str, Any]) -> str:
    """Return the hash of everything that a recording depends on.

    Args:
        model: the original.
        settings: of the evaluation, with seeds and conditions; JSON values.
    """
    weights = dict(model.source.hashes) or _hash_weights(model)
    scheduler = dict(model.scheduler.config) if model.scheduler is not None else None
    content = {
        "version": VERSION,
        "weights": weights,
        "config": model.config,
        "dtype": str(model.spec.dtype),
        "device": str(next(model.module.parameters()).device.type),
        "scheduler": scheduler,
        "settings": settings,
        "libraries": {name: metadata.version(name) for name in ("torch", "diffusers")},
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_weights(model: OpenModel) -> dict[str, str]:
    hashes = {}
    for name, tensor in sorted(model.module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes()
        hashes[name] = hashlib.sha256(raw).hexdigest()
    return hashes


def _files(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*.safetensors"))
    }


def _index(folder: Path) -> dict[str, Any] | None:
    """Return a recording's index, or None where its files are not those that it lists."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return index if index["files"] == _files(folder) else None


def recorded(cache: Path | None, key: str, record: Callable[[Path], dict[str, Any]]) -> Reference:
    """Return the recording with `key`, made now unless it is kept.

    Args:
        cache: folder of recordings; None: a temporary folder that lives as long as the result.
        key: content hash.
        record: fills an empty folder and returns the index.
    """

    def fill(folder: Path) -> dict[str, Any]:
        index = record(folder)
        # Through JSON, so that a recording made now and one found again read the same.
        text = json.dumps({**index, "files": _files(folder)}, indent=1, sort_keys=True)
        (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")
        again: dict[str, Any] = json.loads(text)
        return again

    if cache is None:
        temporary_folder = tempfile.TemporaryDirectory(prefix="compress-reference-")
        folder = Path(temporary_folder.name)
        return Reference(folder, fill(folder), temporary_folder)
    folder = cache / f"reference-{key[:32]}"
    if folder.exists():
        index = _index(folder)
        if index is not None:
            return Reference(folder, index)
        aside = temporary_beside(folder)
        folder.rename(aside)
        shutil.rmtree(aside)
    with atomic_folder(folder) as temporary:
        index = fill(temporary)
    return Reference(folder, index)
