"""Files of a Hub repository: configs first, weights only when they are needed. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import SourceError
from ..runtime.fetch import DENOISERS
from ..runtime.hub_errors import translated
from .companions import NAMES
from .origins import NAME as DEPTH_FILE

# `*` also matches slashes on the Hub, so the folders are named one by one.
_OF_COMPONENT = ("config.json", "*.safetensors.index.json", DEPTH_FILE)
_CONFIG_PATTERNS = (
    "config.json", "model_index.json", "scheduler/scheduler_config.json", "*.safetensors.index.json",
    *(f"{name}/{file}" for name in DENOISERS for file in _OF_COMPONENT), "README.md", DEPTH_FILE, *NAMES,
)  # fmt: skip
# The licence is inherited: the card names it, these hold its text. They say by patterns what
# `source_card.is_text_name` says: at the top, and .md, .txt or no suffix at all.
_TEXTS = ("[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]", "[Nn][Oo][Tt][Ii][Cc][Ee]")
_TEXT_PATTERNS = tuple(f"{text}{rest}" for text in _TEXTS for rest in ("", "[-_.]*"))
_NO_TEXTS = ("/*", ".*[!dDtT]", ".*[!mM][dD]", ".*[!.][mM][dD]", ".*[!xX][tT]", ".*[!tT][xX][tT]",
             ".*[!.][tT][xX][tT]", ".[dD]", ".[tT]", ".[xX][tT]")  # fmt: skip
_NO_TEXT_PATTERNS = tuple(f"{text}*{rest}" for text in _TEXTS for rest in _NO_TEXTS)
OTHER_VARIANTS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.fp16-*", "*.bf16-*")
"""Files that hold the same weights once more, which are not fetched."""


def fetch_configs(repo_id: str, revision: str | None, subfolder: str | None) -> tuple[Path, str]:
    """Fetch the configs of a repository.

    Returns:
        The local snapshot folder and the commit it is of.

    Raises:
        HubError: the repository is missing, private or gated, or the network is down.
    """
    patterns = [*_CONFIG_PATTERNS, *_TEXT_PATTERNS]
    if subfolder:
        names = (*_OF_COMPONENT, *NAMES)
        patterns += [f"{subfolder}/{name}" for name in names]
    folder = fetch(repo_id, revision, patterns, ignore=_NO_TEXT_PATTERNS)
    return folder, folder.name


def fetch_weights(repo_id: str, revision: str, subfolder: str) -> None:
    """Fetch the safetensors of one component of a repository into the same snapshot.

    Raises:
        SourceError: the repository holds no safetensors there.
        HubError: as `fetch_configs`.
    """
    prefix = "" if subfolder in ("", ".") else f"{subfolder}/"
    patterns = [f"{prefix}diffusion_pytorch_model*.safetensors", f"{prefix}model*.safetensors"]
    folder = fetch(repo_id, revision, patterns, ignore=OTHER_VARIANTS)
    if not any((folder / prefix).glob("*.safetensors")):
        raise SourceError(
            f"{repo_id}: no safetensors weights in {prefix or 'the repository'} (pickles are never opened)",
            hint="ask for a revision that has them, such as refs/pr/1, or convert them where you trust them",
        )


def fetch(repo_id: str, revision: str | None, patterns: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Fetch what matches `patterns` and return the local snapshot folder.

    Raises:
        HubError: with what to do about it.
    """
    from huggingface_hub import snapshot_download

    with translated(repo_id if revision is None else f"{repo_id}@{revision}"):
        path = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignore) or None
        )
    return Path(path)
