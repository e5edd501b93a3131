"""From what a user writes to a local folder: a path, `builtin:NAME`, or a Hub id. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ..errors import SourceError
from .hub_errors import translated
from .strict_json import parse_object

BUILTIN_PREFIX = "builtin:"
_PIPELINE_NAME = "model_index.json"
DENOISERS = ("transformer", "unet")
"""Folders of a pipeline that may hold the component to compress; the first that is there counts."""
_MAX_INDEX_BYTES = 2**20


def fetch(path_or_repo: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Return the local folder; a Hub id's JSON and safetensors files are downloaded first.

    Raises:
        SourceError: neither a folder nor the form of a Hub id.
        HubError: the Hub or the network refused.
    """
    text = str(path_or_repo)
    if text.startswith(BUILTIN_PREFIX):
        root = Path(__file__).parents[1] / "models" / "builtin" / Path(text.removeprefix(BUILTIN_PREFIX)).name
    elif Path(path_or_repo).is_dir():
        root = Path(path_or_repo)
    elif isinstance(path_or_repo, str) and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        root = _download(text, revision, subfolder)
    else:
        hint = "give an existing folder or a Hub id such as org/name"
        raise SourceError(f"{text} is not a folder that exists, nor the name of a repository", hint=hint)
    if subfolder is None and (root / _PIPELINE_NAME).is_file():
        subfolder = next((name for name in DENOISERS if (root / name).is_dir()), None)
    folder = root / subfolder if subfolder else root
    if not folder.resolve().is_relative_to(root.resolve()):
        raise SourceError(f"{text}: subfolder {subfolder!r} lies outside of it")
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder", hint="name an existing subfolder, or none")
    return folder


def _download(repo: str, revision: str | None, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise SourceError(f"{repo} is neither a folder nor a Hub id: {error}") from None
    with translated(repo if revision is None else f"{repo}@{revision}"):
        root = Path(
            snapshot_download(repo, revision=revision, allow_patterns=["config.json", _PIPELINE_NAME])
        )
        if subfolder is None and (root / _PIPELINE_NAME).is_file():
            subfolder = _denoiser(root / _PIPELINE_NAME)
        # A pattern's `*` crosses slashes: the other parts of a pipeline must be kept out by name.
        prefix, others = (f"{subfolder}/", None) if subfolder else ("", "*/*")
        patterns = [f"{prefix}*.json", f"{prefix}*.safetensors"]
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=others)
        )


def _denoiser(index: Path) -> str:
    """Return the folder of the denoiser that a pipeline's index names."""
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise SourceError(f"{index}: {index.stat().st_size} bytes; at most {_MAX_INDEX_BYTES} are read")
    parts = parse_object(index.read_bytes(), str(index))
    return next((name for name in DENOISERS if name in parts), DENOISERS[0])
