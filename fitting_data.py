"""Has a recipe for a denoiser the data that its stages train on, and a use for those it names? Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .calibration.image_files import find_images
from .calibration.latent_files import find_latents, fingerprint
from .errors import SourceError
from .models.checkpoint import BUILTIN_PREFIX, locate
from .models.latent_sizes import check_latents
from .models.registry import FAMILY_NAMES, task_of
from .models.vae import vae_beside, vae_hashes
from .recipes.data import PATH_KEYS
from .recipes.recovery import MaskedDistillSettings
from .recipes.schema import ModelRef
from .runtime.hashes import digest, file_sha256

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe


def check_data(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse a recipe that trains a denoiser on nothing, or names data and trains none.

    Latents and images that are there are held against the model; whether they are is looked at by
    `preflight.check_calibration`.

    Raises:
        RecipeError: data are missing, or of no use; with the place in the file.
        SourceError: they do not fit the model.
    """
    recipe = loaded.recipe
    family = FAMILY_NAMES[checkpoint.class_name]
    if task_of(family) != "denoise":
        return
    learning = [
        (index, stage) for index, stage in enumerate(recipe.stages) if stage.settings.learns_from_data
    ]
    _check_teachers(loaded, checkpoint)
    data = recipe.calibration.data
    if data is None:
        for index, stage in learning:
            raise loaded.error(
                ("stages", index, stage.method),
                "trains the model, and calibration names no data to train on",
                "add `data: {generate: 1000}` to calibration, or latents or images of your own",
            )
        return
    if not learning:
        raise loaded.error(("calibration", "data"), "is of no use: no stage trains the model", "leave it out")
    if data.images is not None and family != "dit":
        raise loaded.error(
            ("calibration", "data", "images"),
            f"has no captions, and {family} is conditioned on text",
            "use latents with prompt_embeds, or generate",
        )
    if data.latents is not None and data.latents.exists():
        _check_latents(data.latents, checkpoint)
    if data.images is not None and data.images.exists():
        layout = find_images(data.images)
        if not layout.train.labelled:
            raise SourceError(
                f"{data.images}: the images have no labels, and {family} is conditioned on classes",
                hint="put them into a folder per class",
            )


def _check_teachers(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse a model that is asked to learn from itself: before the first stage it is the original."""
    if not loaded.recipe.stages:
        return
    stage = loaded.recipe.stages[0]
    settings = stage.settings
    if not isinstance(settings, MaskedDistillSettings) or not settings.asks_original:
        return
    location = ("stages", 0, stage.method)
    if settings.teacher is None:
        raise loaded.error(
            location,
            "learns from the original, and no stage before it has changed that",
            "name a `teacher`, or write answers: 0 and features: 0",
        )
    if _is_itself(settings.teacher, loaded.recipe.model, checkpoint):
        raise loaded.error(
            (*location, "teacher"),
            "is the model itself, and no stage before this one has changed that",
            "name another model, or write answers: 0 and features: 0",
        )


def _is_itself(teacher: str, model: ModelRef, checkpoint: Checkpoint) -> bool:
    if checkpoint.revision is not None:
        return teacher == model.id and model.revision is None and model.subfolder is None
    known = teacher.startswith(BUILTIN_PREFIX) or Path(teacher).expanduser().is_dir()
    return known and locate(ModelRef(id=teacher), weights=False).folder.samefile(checkpoint.folder)


def _check_latents(path: Path, checkpoint: Checkpoint) -> None:
    part = find_latents(path)[0]
    check_latents(checkpoint.config, part.shape, part.path, checkpoint.id)


def stage_data(recipe: Recipe, folder: Path, revision: str | None) -> dict[int, str]:
    """Return index of a stage -> hash of the data that it trains a denoiser on; files are read once for all.

    Args:
        recipe: that fits its model.
        folder: of the model: the VAE that encodes images lies beside it.
        revision: of the model on the Hub, which fixes the VAE as well; None of a folder.

    Raises:
        SourceError: the data cannot be read.
    """
    data = recipe.calibration.data
    learning: dict[int, str | None] = {
        index: getattr(stage.settings, "teacher", None)
        for index, stage in enumerate(recipe.stages)
        if stage.settings.learns_from_data
    }
    if data is None or not learning:
        return {}
    content: dict[str, Any] = data.model_dump(mode="json", exclude=set(PATH_KEYS))
    if data.latents is not None:
        content["latents"] = fingerprint(find_latents(data.latents))
    if data.images is not None:
        content["images"] = find_images(data.images).fingerprint()
        place = vae_beside(folder) if revision is None else None
        content["vae"] = [] if place is None else vae_hashes(place)
    named = {name for name in learning.values() if name is not None}
    teachers = {name: _checkpoint_hash(name) for name in named}
    return {
        index: digest(content if name is None else {**content, "teacher": teachers[name]})
        for index, name in learning.items()
    }


def _checkpoint_hash(id_: str) -> str:
    """Return the hash of another checkpoint: of its commit, or of its files."""
    checkpoint = locate(ModelRef(id=id_))
    weights = checkpoint.revision or [file_sha256(path) for path in checkpoint.files]
    return digest([dict(checkpoint.config), weights])
