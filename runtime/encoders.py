"""The text encoders beside a denoiser in its pipeline's folder: found, hashed, recognised. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import SourceError
from .hashes import file_sha256
from .manifest import QuantizedModule

_PIPELINE_FILE = "model_index.json"
_WEIGHTS = "text_encoder*/*.safetensors"
_ENCODING_FILES = (_PIPELINE_FILE, "text_encoder*/*", "tokenizer*/*")


def hashes_beside(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every weight file of the text encoders in the pipeline of a component.

    Args:
        folder: of the denoiser, or of the pipeline itself.

    Returns:
        path in the pipeline's folder -> SHA-256; empty where there is no pipeline or no such file.
    """
    root = _pipeline_of(folder)
    if root is None:
        return {}
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.glob(_WEIGHTS))}


def encoding_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that decides how the pipeline of a component encodes prompts.

    Args:
        folder: of the denoiser, or of the pipeline itself.

    Returns:
        path in the pipeline's folder -> SHA-256; empty where there is no pipeline.

    Raises:
        SourceError: one cannot be read.
    """
    root = _pipeline_of(folder)
    if root is None:
        return {}
    files = sorted(path for pattern in _ENCODING_FILES for path in root.glob(pattern) if path.is_file())
    try:
        return {path.relative_to(root).as_posix(): file_sha256(path) for path in files}
    except OSError as error:
        raise SourceError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from None


def check_encoders(quantization: Mapping[str, QuantizedModule], folder: Path) -> None:
    """Refuse a denoiser whose stored first tokens come from other text encoders than those beside it.

    Files that are not there are not missed: a denoiser may be loaded alone.

    Args:
        quantization: layer name -> scheme.
        folder: of the denoiser.

    Raises:
        SourceError: a text encoder beside it has other weights than the recorded ones.
    """
    recorded: dict[str, str] = {}
    for scheme in quantization.values():
        if scheme.first_token is not None:
            recorded |= scheme.first_token.encoders
    root = _pipeline_of(folder) if recorded else None
    if root is None:
        return
    for name, expected in recorded.items():
        path = root / name
        if path.is_file() and file_sha256(path) != expected:
            raise SourceError(
                f"{path}: not the text encoder that {folder.name} was compressed with; its keys and values"
                " for the first token are stored and would be another encoder's",
                hint="use the recorded encoder, or compress again with this one beside the model",
            )


def _pipeline_of(folder: Path) -> Path | None:
    return next((place for place in (folder, folder.parent) if (place / _PIPELINE_FILE).is_file()), None)
