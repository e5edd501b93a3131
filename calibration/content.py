"""What a recording depends on, as one hash; and whether the files of a kept one are still its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.base import OpenModel
from ..runtime.atomic import atomic_file, sweep_partials
from ..runtime.encoders import encoding_hashes
from ..runtime.hashes import digest, file_sha256
from ..runtime.tensor_hashes import tensors_sha256
from .inputs import by_content

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings


def condition_content(model: OpenModel, settings: CalibrationSettings) -> dict[str, Any]:
    """Return what the samples of a denoiser are drawn for as JSON values, by content.

    Prompts mean what the text encoders beside the denoiser make of them, so these count as well: by
    the files of a local pipeline, by the commit of one from the Hub.

    Args:
        model: the original.
        settings: of the recipe.

    Raises:
        SourceError: a file cannot be read.
    """
    values = by_content(settings)
    if settings.prompts is not None and settings.embeddings is None:
        source = model.source
        encoders: Any = f"{source.id}@{source.revision}"
        if source.revision is None:
            encoders = encoding_hashes(source.folder)
        values["encoders"] = {"files": encoders, "transformers": version("transformers")}
    return values


def content_key(model: OpenModel, settings: Mapping[str, Any]) -> str:
    """Return the content hash of a recording, 64 hexadecimal digits.

    Args:
        model: the original.
        settings: everything else that the recording depends on; JSON values, files by their content
            (`inputs.by_content`).
    """
    reference = next(model.module.parameters())
    content = {
        "weights": dict(model.source.hashes) or hash_weights(model.module),
        "config": dict(model.config),
        "dtype": str(reference.dtype),
        "device": reference.device.type,
        "scheduler": None if model.scheduler is None else dict(model.scheduler.config),
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    return digest(content)


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 of what a module holds in memory, 64 hexadecimal digits."""
    return tensors_sha256(module.state_dict())


def read_index(path: Path) -> dict[str, Any] | None:
    """Return a recording's index; None where there is none that can be read: the recording is not kept."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return index if isinstance(index, dict) else None


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Write what `read_index` reads, such as file name -> SHA-256; whole, or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def recording_folder(cache: Path | None, key: str) -> tuple[Path, tempfile.TemporaryDirectory[str] | None]:
    """Return where a calibration is kept, swept of what a killed run left half-written.

    Args:
        cache: folder for recordings, shared between runs; None: a temporary one.
        key: content hash of the recording.

    Returns:
        The folder, and what keeps a temporary one alive.
    """
    keeper = tempfile.TemporaryDirectory(prefix="compress-calibration-") if cache is None else None
    folder = Path(keeper.name if keeper is not None else cache or "") / f"calibration-{key[:32]}"
    folder.mkdir(parents=True, exist_ok=True)
    sweep_partials(folder)
    return folder, keeper


def is_intact(path: Path, sha256: str | None) -> bool:
    """Tell whether a recorded file holds what was written to it; one that cannot be read does not.

    Args:
        path: the file.
        sha256: as the index has it; None: the index does not know the file.
    """
    try:
        return sha256 is not None and file_sha256(path) == sha256
    except OSError:
        return False
