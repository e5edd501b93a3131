"""An adapter of a compressed cache and its original: one checkpoint in two folders. Torch-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import SourceError
from ..validate import StoredCheckpoint, open_folder
from .adapter import StoredAdapter, base_folder, check_base, check_contents, is_adapter, open_adapter


def open_whole(folder: str | Path, base: str | Path | None = None) -> StoredCheckpoint:
    """Open a folder; one that holds an adapter, together with its original.

    Args:
        folder: of this machine.
        base: the original of an adapter, where it is not to be the one that the adapter names; of a whole
            checkpoint it is not looked at.

    Raises:
        SourceError: a folder is damaged, or the original is another one.
        HubError: the original is on the Hub, which refused.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return open_folder(folder)
    adapter = open_adapter(folder)
    return assembled(adapter, base_folder(adapter, base))


def assembled(adapter: StoredAdapter, folder: Path) -> StoredCheckpoint:
    """Return an original with the factors of an adapter.

    Args:
        adapter: from `open_adapter`.
        folder: of the original.

    Raises:
        SourceError: the folder is damaged, or is not of the model that the adapter was made for; or the
            factors are damaged.
    """
    check_contents(adapter)
    stored = open_folder(folder)
    check_base(adapter, str(folder), stored.config, stored.tensors)
    if stored.manifest.kv_cache is not None:
        raise SourceError(
            f"{folder}: its cache is compressed already, by factors of its own",
            hint="load it without the adapter, or name the original as `base`",
        )
    manifest = stored.manifest.model_copy(update={"kv_cache": adapter.document.scheme})
    return replace(stored, manifest=manifest, tensors={**stored.tensors, **adapter.tensors})
