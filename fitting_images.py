"""Has a recipe for a classifier the images and labels that its stages and figures need? Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .calibration.image_files import (
    EMPTY_HINT,
    FileList,
    Images,
    Layout,
    TensorFile,
    find_images,
    held_out_count,
)
from .calibration.inputs import OWN_IMAGES, image_place
from .calibration.labels import class_names, class_numbers
from .errors import SourceError
from .models.registry import FAMILY_NAMES, task_of
from .recipes.pruning import IsomorphicSettings
from .recipes.recovery import FinetuneSettings

if TYPE_CHECKING:
    from .models.checkpoint import Checkpoint
    from .recipes.loader import LoadedRecipe
    from .recipes.schema import Recipe
    from .recipes.tree import Location

LABEL_FREE = "write loss: pseudo_labels or output_norm, or importance: magnitude; or give labels"


def check_images(loaded: LoadedRecipe, checkpoint: Checkpoint) -> None:
    """Refuse a recipe for a classifier whose images or labels are missing or too few.

    Raises:
        SourceError: there are no images, or too few, or their classes are not the model's.
        RecipeError: labels are needed and there are none; with its place in the file.
    """
    if task_of(FAMILY_NAMES[checkpoint.class_name]) != "classify":
        return
    recipe = loaded.recipe
    place = image_place(recipe.calibration, checkpoint.folder)
    layout: Layout | None = None
    if place is None:
        needs = next(_needs(recipe), None)
        if needs is not None:
            raise SourceError(
                f"{checkpoint.id}: {needs} looks at images, and the recipe names none",
                hint=f"add `calibration: {{images: FOLDER}}`, or put {OWN_IMAGES}/ into the model's folder",
            )
    elif not place.exists():
        return  # a plan needs none; a run that does has been refused by `preflight.check_calibration`
    else:
        layout = find_images(place)
        _check_calibration(loaded, layout, checkpoint)
    trained = list(_check_stages(loaded, layout, checkpoint))
    if recipe.calibration.strict:
        layouts = [*([] if layout is None else [layout]), *trained]
        held_out = None if layout is None else layout.held_out
        _check_strict(layouts, held_out, _channels(checkpoint))


def _check_calibration(loaded: LoadedRecipe, layout: Layout, checkpoint: Checkpoint) -> None:
    _check_classes(layout, checkpoint)
    _check_counts(loaded.recipe, layout)
    measured = layout.train if layout.held_out is None else layout.held_out
    if loaded.recipe.evaluate.quality is not None and not measured.labelled:
        raise loaded.error(
            ("evaluate", "quality"),
            f"is accuracy for a classifier, and the images of {layout.path} have no labels{_lack(measured)}",
            "leave it out, or give labels",
        )


def _needs(recipe: Recipe) -> Iterator[str]:
    """Yield what looks at images, of those of the calibration."""
    for index, stage in enumerate(recipe.stages):
        settings = stage.settings
        if isinstance(settings, IsomorphicSettings) and settings.importance == "magnitude":
            if settings.baselines:
                yield f"stages[{index}].{stage.method}.baselines"
        elif not (isinstance(settings, FinetuneSettings) and settings.images is not None):
            yield f"stages[{index}].{stage.method}"
    yield from (f"evaluate.{part}" for part in ("fidelity", "quality") if getattr(recipe.evaluate, part))


def _lack(images: Images) -> str:
    """Say what a table has in the place of labels."""
    return f" ({images.lack})" if isinstance(images, FileList) and images.lack else ""


def _check_classes(layout: Layout, checkpoint: Checkpoint) -> None:
    """Hold classes, labels and channels against the model; files are decoded later."""
    from .calibration.image_rows import check_channels, row_labels

    if layout.classes:
        class_numbers(layout.classes, checkpoint.config, layout.path)
    for part in (layout.train, layout.held_out):
        if isinstance(part, TensorFile):
            check_channels(part, _channels(checkpoint))
            if part.labelled:
                row_labels(part, len(class_names(checkpoint.config)))


def _channels(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.get("num_channels", 3))


def _check_stages(loaded: LoadedRecipe, layout: Layout | None, checkpoint: Checkpoint) -> Iterator[Layout]:
    """Hold the stages against the images of the calibration; yield those that trainings name."""
    for index, stage in enumerate(loaded.recipe.stages):
        location: Location = ("stages", index, stage.method)
        if isinstance(stage.settings, IsomorphicSettings) and layout is not None:
            _check_scores(loaded, location, stage.settings, layout)
        if isinstance(stage.settings, FinetuneSettings):
            named = layout if stage.settings.images is None else find_images(stage.settings.images)
            if named is not None:
                if named is not layout:
                    _check_classes(named, checkpoint)
                _check_training(loaded, location, stage.settings, named)
                yield named


def _check_strict(layouts: Sequence[Layout], held_out: Images | None, channels: int) -> None:
    """Decode all files that a run may read: a broken one would stop it after weights were changed.

    Raises:
        SourceError: one cannot be decoded, or a folder of a class is empty.
    """
    from .calibration.decoding import unreadable

    for layout in layouts:
        if layout.emptiness:
            raise SourceError(layout.emptiness, hint=EMPTY_HINT)
    parts = [*(layout.train for layout in layouts), *([] if held_out is None else [held_out])]
    paths = list(dict.fromkeys(path for part in parts if isinstance(part, FileList) for path in part.paths))
    found = unreadable(paths, 1 if channels == 1 else 3)
    if found:
        others = f" (and {len(found) - 1:,} more of {len(paths):,})" if len(found) > 1 else ""
        raise SourceError(
            f"{found[0]}{others}",
            hint="remove what cannot be read, or leave out calibration.strict to skip it",
        )


def _check_counts(recipe: Recipe, layout: Layout) -> None:
    """Count files; whether they can be read is seen when they are chosen."""
    every = len(layout.train)
    held_out = held_out_count(every) if layout.held_out is None else len(layout.held_out)
    rest = every - held_out if layout.held_out is None else every
    evaluate = recipe.evaluate
    asked = [
        ("calibration.samples", recipe.calibration.samples, rest, "may be calibrated on"),
        *(
            (f"evaluate.{name}.samples", part.samples, held_out, "are held out for measuring")
            for name, part in (("fidelity", evaluate.fidelity), ("quality", evaluate.quality))
            if part is not None
        ),
    ]
    for key, wanted, have, what in asked:
        if wanted > have:
            raise SourceError(
                f"{layout.path}: {have} of {every if layout.held_out is None else have} images {what};"
                f" {key} asks for {wanted}",
                hint=f"give more images, or lower {key}",
            )


def _check_scores(
    loaded: LoadedRecipe, location: Location, settings: IsomorphicSettings, layout: Layout
) -> None:
    by_labels = settings.importance == "taylor" and settings.loss in (None, "cross_entropy")
    if by_labels and not layout.train.labelled:
        raise loaded.error(
            (*location, "importance" if settings.loss is None else "loss"),
            f"cross_entropy needs labels, and the images of {layout.path} have none{_lack(layout.train)}",
            LABEL_FREE,
        )


def _check_training(
    loaded: LoadedRecipe,
    location: Location,
    settings: FinetuneSettings,
    layout: Layout,
) -> None:
    if layout.train.labelled:
        return
    if settings.distill is None:
        raise loaded.error(
            location,
            f"the images of {layout.path} have no labels to learn from{_lack(layout.train)}",
            "add `distill: {}` to learn from the original instead, or give labels",
        )
    if settings.distill.weight < 1:
        raise loaded.error(
            (*location, "distill", "weight"),
            f"leaves {1 - settings.distill.weight:g} of the loss to labels, and the images of"
            f" {layout.path} have none{_lack(layout.train)}",
            "write 1, or give labels",
        )
