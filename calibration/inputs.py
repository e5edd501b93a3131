"""The files that samples are conditioned on: which they are, whether they are there. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..recipes.data import PATH_KEYS as DATA_PATHS
from ..runtime.hashes import file_sha256

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FILE_KEYS = ("prompts", "embeddings", "text")
"""Keys of `calibration` that name a file of which a result keeps a copy."""


OWN_TEXTS = ("calibration.jsonl", "calibration.txt")
"""Names under which a language model's folder may hold a text of its own to calibrate on."""


def text_file(settings: CalibrationSettings, folder: Path) -> Path | None:
    """Return the text that a language model is calibrated on: the recipe's, or the model's own.

    Args:
        settings: of the recipe.
        folder: of the checkpoint.
    """
    if settings.text is not None:
        return Path(settings.text)
    return next((folder / name for name in OWN_TEXTS if (folder / name).is_file()), None)


OWN_IMAGES = "images"
"""Folder under which a classifier may come with images of its own."""


def image_place(settings: CalibrationSettings, folder: Path) -> Path | None:
    """Return the folder or file of images that a classifier is calibrated on: the recipe's, or its own.

    Args:
        settings: of the recipe.
        folder: of the checkpoint.
    """
    if settings.images is not None:
        return Path(settings.images)
    own = folder / OWN_IMAGES
    return own if own.is_dir() else None


def condition_files(settings: CalibrationSettings) -> list[Path]:
    """Return the files with prompts, embeddings or text that the settings name, in the order of `FILE_KEYS`.

    A recipe beside which they lie under their own base names finds them there, wherever they were
    before; so a copied recipe stays usable with copies of these.
    """
    return [Path(path) for name in FILE_KEYS if (path := getattr(settings, name)) is not None]


def missing_files(settings: CalibrationSettings) -> list[Path]:
    """Return what the settings name and is not there: to be refused before a model is read."""
    data = [] if settings.data is None else [getattr(settings.data, name) for name in DATA_PATHS]
    places = [Path(path) for path in (settings.images, *data) if path is not None and not path.exists()]
    return [path for path in condition_files(settings) if not path.is_file()] + places


def check_table(path: Path) -> None:
    """Refuse a named table of sensitivities that cannot be one, before anything is computed.

    Raises:
        SourceError: no such file, or a folder.
    """
    if path.is_file():
        return
    what = "is a folder, not a table of sensitivities" if path.is_dir() else "no such file"
    raise SourceError(f"{path}: {what}", hint="correct sensitivity.table, or leave it out to measure")


def by_content(settings: CalibrationSettings) -> dict[str, Any]:
    """Return the settings as JSON values, with the SHA-256 of each file in place of its path.

    Raises:
        SourceError: a file with prompts or embeddings cannot be read.
    """
    values = settings.model_dump(mode="json", exclude={"data"})  # it is of no effect on what is recorded
    for name in FILE_KEYS:
        path = getattr(settings, name)
        if path is not None:
            values[name] = _hash(Path(path))
    return values


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
