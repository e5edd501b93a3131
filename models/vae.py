"""The VAE that lies beside a denoiser: where it is, and which one. Torch-free."""

from __future__ import annotations

from pathlib import Path

from ..runtime.hashes import file_sha256

NAME = "vae"
_SUFFIXES = (".json", ".safetensors")


def vae_beside(folder: Path) -> Path | None:
    """Return the folder of the VAE in a denoiser's folder, or beside that; None: there is none.

    Args:
        folder: of the denoiser.
    """
    places = (folder / NAME, folder.parent / NAME)
    return next((place for place in places if (place / "config.json").is_file()), None)


def vae_hashes(place: Path) -> list[str]:
    """Return the SHA-256 of the config and the weights of a VAE, by their names.

    Args:
        place: from `vae_beside`.
    """
    return [file_sha256(path) for path in sorted(place.iterdir()) if path.suffix in _SUFFIXES]
