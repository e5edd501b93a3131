"""The images of a run, found once, before its first stage: what cannot be trained on is refused there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .calibration.image_files import find_images
from .calibration.images import pools_of, training_pool
from .calibration.inputs import image_place
from .calibration.segmentation import scene_pools_of
from .errors import SourceError
from .recipes.recovery import FinetuneSettings

if TYPE_CHECKING:
    from pathlib import Path

    from .calibration.image_sets import Pool, Pools
    from .calibration.scene_sets import ScenePools
    from .models.base import OpenModel
    from .recipes.schema import Recipe


@dataclass(frozen=True)
class RunImages:
    """What a run knows of its images before it computes anything.

    Attributes:
        pools: of the calibration, with those of trainings; None: the calibration has no images.
        data: index of a stage -> hash of the images that it names for itself.
    """

    pools: Pools | ScenePools | None = None
    data: Mapping[int, str] = field(default_factory=dict)


def images_of(model: OpenModel, recipe: Recipe) -> RunImages:
    """Find the images of a run of a classifier or a segmenter; others have none.

    One of each training of a classifier is read, and all that a segmenter is calibrated and measured on.

    Args:
        model: the original.
        recipe: of the run.

    Raises:
        SourceError: images do not fit the model, or none of those of a training can be learned from: they
            cannot be read, or are all held out for measuring.
    """
    if model.family.task == "segment" and recipe.stages:
        return RunImages(_scenes_of(model, recipe))
    if model.family.task != "classify" or not recipe.stages:
        return RunImages()
    settings = recipe.calibration
    place = image_place(settings, model.source.folder)
    pools = None if place is None else pools_of(model, settings, recipe.seed)
    data: dict[int, str] = {}
    trainings: dict[Path, Pool] = {}
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage.settings, FinetuneSettings) or stage.settings.images is None:
            continue
        path = stage.settings.images
        try:
            layout = find_images(path)
            pool = training_pool(model, path, pools, recipe.seed, layout)
            pool.check()
        except SourceError as error:
            where = f"stages[{index}].{stage.method}.images"
            raise SourceError(f"{where}: {error.message}", hint=error.hint) from None
        data[index], trainings[path] = layout.fingerprint(), pool
    return RunImages(None if pools is None else replace(pools, trainings=trainings), data)


def _scenes_of(model: OpenModel, recipe: Recipe) -> ScenePools | None:
    """Divide the images of a segmenter, and look at those that will be asked for."""
    if image_place(recipe.calibration, model.source.folder) is None:
        return None
    pools = scene_pools_of(model, recipe.calibration, recipe.seed)
    pools.train.first(recipe.calibration.samples).scene(0)
    if recipe.evaluate.fidelity is not None:
        pools.held_out.first(recipe.evaluate.fidelity.samples)
    if recipe.evaluate.quality is not None:
        pools.held_out.first(recipe.evaluate.quality.samples, annotated=True)
    return pools
