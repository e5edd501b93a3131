"""What a denoiser is trained on, made once: samples of the original, or encoded images; or found on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import SourceError, StageError
from ..models.base import OpenModel
from ..progress import Progress, step
from ..recipes.data import DataSettings
from ..runtime.hashes import digest
from .conditions import (
    ClassConditions,
    Conditions,
    PromptConditions,
    conditions_for,
    prompt_conditions,
    told_guidance,
)
from .content import condition_content, content_key
from .encoding import Encoder, PixelEncoder, encoder_for, read_pixels, sees_pixels
from .image_files import Images, Layout, find_images
from .images import labels_of
from .labels import class_numbers
from .latent_cache import LatentCache
from .latent_files import FLIPPED, LATENTS
from .latents import LatentSet, checked_labels, given_by, stored_latents
from .sampler import denoise_batch, make_scheduler
from .seeds import generator_for

if TYPE_CHECKING:
    from ..recipes.schema import CalibrationSettings

FORMAT_VERSION = 1
_CONDITIONS = "conditions.safetensors"
_POSITIVE = "positive/"
_OF_TRAJECTORIES = ("samples", "batch_size", "steps", "guidance_scale")
Original = Callable[[], OpenModel]


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a recipe says that its stages train a denoiser on.

    Attributes:
        settings: `calibration` of the recipe.
        seed: of the run.
        cache: folder for recordings, shared between runs; None: a temporary one.
        key: content hash of the original and of all that its samples depend on.
    """

    settings: CalibrationSettings
    seed: int
    cache: Path | None
    key: str

    @classmethod
    def of(
        cls, model: OpenModel, settings: CalibrationSettings, *, seed: int, cache: Path | None
    ) -> TrainingData | None:
        """Return what a recipe says; None where it says nothing.

        Args:
            model: the original.
            settings: of the recipe.
            seed: of the run.
            cache: see the class.
        """
        if settings.data is None:
            return None
        content = {
            name: value
            for name, value in condition_content(model, settings).items()
            if name not in _OF_TRAJECTORIES
        }
        return cls(settings, seed, cache, content_key(model, {"conditions": content, "seed": seed}))

    def latents(self, model: OpenModel, original: Original | None, progress: Progress) -> LatentSet:
        """Return what is trained on; it is made now if it was not before.

        Args:
            model: the denoiser, as it is now.
            original: opens it as it was before any stage; called where samples are missing. None: it is
                `model`, if nothing has changed that.
            progress: gets a step where something is made.

        Raises:
            SourceError: data are missing, damaged, or do not fit the model.
            StageError: samples are missing, and the original is not at hand.
        """
        data = self.settings.data
        assert data is not None  # see `of`
        if data.latents is not None:
            guidance = told_guidance(model, self._settings.guidance_scale)
            return stored_latents(model, Path(data.latents), data.flip, guidance)
        if data.images is not None:
            return self._encoded(model, data, find_images(Path(data.images)), progress)
        return self._drawn(model, data, original, progress)

    def _drawn(
        self, model: OpenModel, data: DataSettings, original: Original | None, progress: Progress
    ) -> LatentSet:
        """Return samples of the original."""
        if data.flip and not sees_pixels(model):
            raise SourceError(
                "calibration.data.flip: the samples are latents, which cannot be mirrored as images can",
                hint="leave out flip",
            )
        count, settings = int(data.generate or 0), self._settings
        content = [FORMAT_VERSION, "drawn", self.key, count, settings.steps, settings.guidance_scale]
        content.append(settings.batch_size)  # the last bits of a sample depend on it
        keep = LatentCache(self.cache, digest(content), count)
        if keep.missing(_CONDITIONS) or keep.left():
            self._draw(self._original(model, original), settings, keep, count, progress)
        given = given_by(_read_conditions(keep.folder / _CONDITIONS, model, settings))
        return keep.latents(model, given, "pixels" if data.flip else None)

    @property
    def _settings(self) -> CalibrationSettings:
        """How samples are drawn: as those that methods look at, but for what the data say."""
        data = self.settings.data
        assert data is not None  # see `of`
        scale = self.settings.guidance_scale if data.guidance_scale is None else data.guidance_scale
        return self.settings.model_copy(
            update={
                "steps": data.steps or self.settings.steps,
                "guidance_scale": scale,
                "batch_size": data.batch_size or self.settings.batch_size,
            }
        )

    def _original(self, model: OpenModel, original: Original | None) -> OpenModel:
        if not model.changed:
            return model
        if original is None:
            raise StageError("samples of the original are missing, and a stage has changed the model already")
        return original()

    def _draw(
        self,
        model: OpenModel,
        settings: CalibrationSettings,
        keep: LatentCache,
        count: int,
        progress: Progress,
    ) -> None:
        conditions = conditions_for(model, settings, count, self.seed)
        if keep.missing(_CONDITIONS):
            keep.write(_CONDITIONS, _flat(conditions))
        scheduler = make_scheduler(model, settings.scheduler)
        # Not the noise that the recipe's figures are measured on.
        seed = generator_for(self.seed, "training data").initial_seed()
        size = settings.batch_size
        batches = sum(len(range(0, len(rows), size)) for _, rows in keep.left())
        with step(progress, "drawing training samples", batches * settings.steps):
            for name, rows in keep.left():
                found = [
                    denoise_batch(
                        model, scheduler, conditions, (start, min(start + size, rows.stop)),
                        steps=settings.steps, guidance_scale=settings.guidance_scale, seed=seed,
                        on_call=None, progress=progress,
                    ).cpu()
                    for start in range(rows.start, rows.stop, size)
                ]  # fmt: skip
                keep.write(name, {LATENTS: torch.cat(found)})

    def _encoded(self, model: OpenModel, data: DataSettings, layout: Layout, progress: Progress) -> LatentSet:
        """Return images as the model sees them, with the mirrored ones beside them."""
        if model.family.name != "dit":
            raise SourceError(
                "calibration.data.images: has no captions, and the model is conditioned on text",
                hint="set calibration.data.latents to files with latents and prompt_embeds",
            )
        images = layout.train
        conditions = self._labels(model, layout, progress)
        encoder = encoder_for(model, self.seed)
        flipped = data.flip is not False
        stored = flipped and not isinstance(encoder, PixelEncoder)
        side = int(model.config["sample_size"])
        content = [FORMAT_VERSION, "encoded", images.fingerprint(), encoder.key, encoder.channels, side]
        size = data.batch_size or self.settings.batch_size
        keep = LatentCache(self.cache, digest([*content, stored, size, self.seed]), len(images))
        if keep.left():
            with step(progress, "encoding images", sum(len(rows) for _, rows in keep.left())):
                for name, rows in keep.left():
                    keep.write(name, _encode(images, rows, encoder, stored, size, progress))
        mirror = None if not flipped else "stored" if stored else "pixels"
        found = keep.latents(model, given_by(conditions), mirror)
        return replace(found, key=digest([found.key, conditions.labels.tolist()]))

    def _labels(self, model: OpenModel, layout: Layout, progress: Progress) -> ClassConditions:
        classes = int(model.config["num_embeds_ada_norm"])
        # Denoisers do not say what their classes are called, only how many there are.
        numbers = class_numbers(layout.classes, {"num_labels": classes}, layout.path)
        if numbers.note:
            progress.note(numbers.note)
        labels = labels_of(layout.train, numbers.numbers, classes)
        if labels is None:
            raise SourceError(
                f"{layout.path}: the images have no labels, and the model is class-conditional",
                hint="put them into a folder per class",
            )
        return checked_labels(model, labels, layout.path)


def _encode(
    images: Images, rows: range, encoder: Encoder, mirrored: bool, size: int, progress: Progress
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {LATENTS: []}
    for start in range(rows.start, rows.stop, size):
        chosen = range(start, min(start + size, rows.stop))
        pixels = read_pixels(images, chosen, encoder)
        found[LATENTS].append(encoder(pixels, start))
        if mirrored:
            found.setdefault(FLIPPED, []).append(encoder(pixels.flip(-1), start))
        progress.advance(len(chosen))
    return {name: torch.cat(parts).contiguous() for name, parts in found.items()}


def _flat(conditions: Conditions) -> dict[str, Tensor]:
    if isinstance(conditions, ClassConditions):
        return {"labels": conditions.labels}
    assert isinstance(conditions, PromptConditions)
    names = {_POSITIVE + name: tensor for name, tensor in conditions.positive.items()}
    return {"index": conditions.index, **names}


def _read_conditions(path: Path, model: OpenModel, settings: CalibrationSettings) -> Conditions:
    """Return conditions that were kept: prompts need not be encoded again."""
    tensors = load_file(path)
    if "labels" in tensors:
        return ClassConditions(tensors["labels"], null=int(model.config["num_embeds_ada_norm"]))
    positive = {
        name.removeprefix(_POSITIVE): tensor for name, tensor in tensors.items() if name.startswith(_POSITIVE)
    }
    return prompt_conditions(model, settings, positive, {}, tensors["index"])
