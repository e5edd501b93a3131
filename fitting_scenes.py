"""Has a recipe for a model that segments the images and masks that it needs? Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calibration.inputs import OWN_IMAGES, image_place
from .calibration.scene_files import (
    MASKS_HINT,
    SceneFiles,
    SceneLayout,
    choice_count,
    find_scenes,
    held_out_counts,
)
from .errors import SourceError
from .models.registry import FAMILY_NAMES, task_of
from .recipes.slimsam import SlimSamSettings

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe

_OPENED_AT_MOST = 64
"""Files of masks that are opened here; with more, the others are seen when images are chosen."""


def check_scenes(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse a recipe for a model that segments whose images or masks are missing or too few.

    Raises:
        SourceError: there are no images, or too few, or they cannot be read where all are asked for.
        RecipeError: masks are needed and there are none; with its place in the file.
    """
    if task_of(FAMILY_NAMES[checkpoint.class_name]) != "segment":
        return
    recipe = loaded.recipe
    place = image_place(recipe.calibration, checkpoint.folder)
    if place is None:
        needs = _needs(recipe)
        if needs:
            raise SourceError(
                f"{checkpoint.id}: {needs[0]} looks at images, and the recipe names none",
                hint=f"add `calibration: {{images: FOLDER}}`, or put {OWN_IMAGES}/ into the model's folder",
            )
        return
    if not place.exists():
        return  # a plan needs none; a run that does has been refused by `preflight.check_calibration`
    layout = find_scenes(place)
    _check_counts(recipe, layout)
    _check_masks(loaded, layout)
    if recipe.calibration.strict:
        _check_strict(layout)


def _needs(recipe: Recipe) -> list[str]:
    """Return what looks at images."""
    stages = [
        f"stages[{index}].{stage.method}"
        for index, stage in enumerate(recipe.stages)
        if stage.settings.calibrates
    ]
    return stages + [f"evaluate.{part}" for part in ("fidelity", "quality") if getattr(recipe.evaluate, part)]


def _parts(layout: SceneLayout) -> tuple[int, int]:
    """Return how many images may be learned from, and how many are held out."""
    if layout.held_out is not None:
        return len(layout.train), len(layout.held_out)
    masked = sum(layout.train.masked)
    held_out = sum(held_out_counts(masked, len(layout.train) - masked))
    return len(layout.train) - held_out, held_out


def _check_counts(recipe: Recipe, layout: SceneLayout) -> None:
    """Count files; whether they can be read is seen when they are chosen."""
    rest, held_out = _parts(layout)
    every = len(layout.train)
    chosen = max(
        (
            choice_count(rest, stage.settings.choice_images)
            for stage in recipe.stages
            if isinstance(stage.settings, SlimSamSettings)
        ),
        default=0,
    )
    what = "may be scored and trained on"
    if chosen and rest - chosen < 1:
        raise SourceError(
            f"{layout.path}: {rest} of {every} images {what}; some are trained on, others choose the epoch",
            hint="give more images",
        )
    asked = [("calibration.samples", recipe.calibration.samples, rest - chosen, every, what)]
    fidelity = recipe.evaluate.fidelity
    if fidelity is not None:
        measured = every if layout.held_out is None else held_out
        asked.append(
            ("evaluate.fidelity.samples", fidelity.samples, held_out, measured, "are held out for measuring")
        )
    for key, wanted, have, of, kind in asked:
        if wanted > have:
            apart = f" ({chosen} choose the epoch)" if chosen and kind == what else ""
            raise SourceError(
                f"{layout.path}: {have} of {of} images {kind}{apart}; {key} asks for {wanted}",
                hint=f"give more images, or lower {key}",
            )


def _check_masks(loaded: LoadedRecipe, layout: SceneLayout) -> None:
    """Hold `evaluate.quality` against the files of masks."""
    quality = loaded.recipe.evaluate.quality
    if quality is None:
        return
    measured = layout.train if layout.held_out is None else layout.held_out
    usable, masked = _with_masks(measured), sum(measured.masked)
    if not usable:
        empty = f": no .json file beside them, of {masked}, holds one that can be read" if masked else ""
        raise loaded.error(
            ("evaluate", "quality"),
            f"compares with true masks, and the images of {layout.path} have none{empty}",
            f"leave it out, or give masks: {MASKS_HINT}",
        )
    have = usable if layout.held_out is not None else held_out_counts(usable, 0)[0]
    if quality.samples > have:
        raise SourceError(
            f"{layout.path}: {have} of {usable} images with masks are held out for measuring;"
            f" evaluate.quality.samples asks for {quality.samples}",
            hint="give more images with masks, or lower evaluate.quality.samples",
        )


def _with_masks(files: SceneFiles) -> int:
    """Return how many images have masks; of many, how many have a file of them."""
    from .calibration.scene_reading import has_masks

    rows = [row for row, masked in enumerate(files.masked) if masked]
    if len(rows) > _OPENED_AT_MOST:
        return len(rows) if any(has_masks(files, row) for row in rows[:_OPENED_AT_MOST]) else 0
    return sum(has_masks(files, row) for row in rows)


def _check_strict(layout: SceneLayout) -> None:
    """Read all files that a run may read: a broken one would stop it after weights were changed."""
    from .calibration.scene_reading import unreadable_scenes

    parts = [layout.train, *([] if layout.held_out is None else [layout.held_out])]
    found = unreadable_scenes(parts)
    if found:
        others = f" (and {len(found) - 1:,} more of {sum(map(len, parts)):,})" if len(found) > 1 else ""
        raise SourceError(
            f"{found[0]}{others}",
            hint="remove what cannot be read, or leave out calibration.strict to skip it",
        )
