"""Compare a compressed model that segments with its original, on images that nothing was trained on.

Both get the same images and the same points. The embeddings of the images say how far the encoders are apart
(SQNR); the masks at seeded random points, how far the answers are (intersection over union); and true masks,
where there are any, how good the answers are (mIoU of both, one point an object). Of the masks that a model
offers for a point the one counts that it rates best itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..calibration.classification import warn_of_left_out
from ..calibration.content import content_key
from ..calibration.scene_sets import ScenePools, SceneSet
from ..calibration.scenes import Annotation, Scene
from ..calibration.seeds import generator_for
from ..calibration.segmentation import scene_pools_of
from ..calibration.segmenting import best_masks, embeddings, iou, random_points
from ..models.base import OpenModel
from ..progress import Progress, step, track
from ..recipes.schema import CalibrationSettings, EvaluateSettings
from ..runtime.hashes import digest
from ..runtime.sam_sizes import sam_encoder
from .evaluator import Evaluation
from .layers import Powers
from .mask_examples import COUNT, MaskExample, example, pack, unpack
from .mask_metrics import agreement_details, mean, size_rows
from .metrics import powers
from .reference import VERSION, Reference, recorded
from .size import linear_inventory

_POINTS_AT_ONCE = 8  # their masks have the size of the stored image
_TOGETHER_BYTES = 2**29


@dataclass(frozen=True)
class _Image:
    """An image that is measured on.

    Attributes:
        number: of its file in the recording.
        scenes: the set that it is read from, as `index` there.
        fidelity: whether both models' masks are compared on it.
        quality: whether they are held against its true masks.
        shown: whether it gives an example.
    """

    number: int
    scenes: SceneSet
    index: int
    fidelity: bool
    quality: bool
    shown: bool

    @property
    def name(self) -> str:
        """What it is called."""
        return self.scenes.names[self.index]

    def annotations(self) -> Sequence[Annotation]:
        """Return its true masks."""
        return self.scenes.annotations(self.index)


@dataclass
class _Found:
    """What the images say so far: names and intersections over union by image, powers of the embeddings."""

    total: Powers = field(default_factory=Powers)
    names: list[str] = field(default_factory=list)
    agreement: list[Tensor] = field(default_factory=list)
    shares: list[Tensor] = field(default_factory=list)
    original: list[Tensor] = field(default_factory=list)
    result: list[Tensor] = field(default_factory=list)
    examples: list[MaskExample] = field(default_factory=list)


class SegmentationEvaluator:
    """Measures by the recipe's settings; deterministic for a seed.

    Args:
        settings: what to measure.
        seed: of the run.
        calibration: the images, and how they are divided.
        pools: of `scene_pools_of` for the original, where they were found already.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        seed: int,
        calibration: CalibrationSettings,
        pools: ScenePools | None = None,
    ) -> None:
        self._settings, self._seed, self._calibration = settings, seed, calibration
        self._given = pools
        self._chosen: tuple[str, ScenePools, list[_Image]] | None = None

    def reference(
        self, model: OpenModel, cache: Path | None, progress: Progress, *, fresh: bool = False
    ) -> Reference:
        """Record the original's embeddings and masks.

        Args:
            model: before any stage.
            cache: folder that keeps recordings by content hash; None keeps nothing.
            progress: told about it, and about images that cannot be read.
            fresh: record anew also where a recording is kept, and replace that.

        Raises:
            SourceError: the images do not fit the model, or there are too few, or too few with masks.
        """
        if not self._measures():
            return recorded(cache, digest([model.source.id, "nothing"]), lambda _: {}, fresh=fresh)
        pools, images = self._images(model)
        warn_of_left_out(_widest(images), pools.held_out.path.as_posix(), progress)

        def record(folder: Path) -> dict[str, Any]:
            with step(progress, "record the original"):
                for image, scene, embedding in self._embedded(model, images, progress):
                    tensors = self._record(model.module, image, scene, embedding)
                    save_file(tensors, folder / _file(image.number))
            return {"images": len(images)}

        parts = ("fidelity", "quality")
        chosen = {
            "version": VERSION,
            "evaluate": self._settings.model_dump(mode="json", include=set(parts)),
            "images": list(dict.fromkeys(image.scenes.key for image in images)),
            "seed": self._seed,
        }
        return recorded(cache, content_key(model, chosen), record, fresh=fresh)

    def compare(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model as it is now against the recording.

        Args:
            model: after the stages.
            reference: what `reference` returned for the original.
            progress: told about it.
        """
        result = Evaluation(details={"linears": linear_inventory(model)})
        if self._measures():
            self._measure(model, reference, result, progress, examples=True)
        return result

    def between(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model between two stages; without examples.

        Args:
            model: as it is now.
            reference: what `reference` returned for the original.
            progress: told about it.
        """
        result = Evaluation()
        if self._measures():
            self._measure(model, reference, result, progress, examples=False)
        return result

    def _measure(
        self,
        model: OpenModel,
        reference: Reference,
        result: Evaluation,
        progress: Progress,
        *,
        examples: bool,
    ) -> None:
        pools, images = self._images(model)
        found = _Found()
        with step(progress, "masks at the same points"):
            for image, scene, embedding in self._embedded(model, images, progress):
                stored = load_file(reference.folder / _file(image.number))
                _compare(model.module, image, scene, embedding, stored, found)
                if image.shown and examples:
                    found.examples.append(_example(model.module, image, scene, embedding, stored))
        widest = _widest(images)
        result.details["segmentation"] = {
            "held_out": len(pools.held_out.order),
            "skipped": len(widest.skipped),
            "copies": pools.train.copies,
            "seed": self._seed,
            **_account(self._settings, found, result.metrics),
        }
        result.masks = tuple(found.examples)

    def _measures(self) -> bool:
        return self._settings.fidelity is not None or self._settings.quality is not None

    def _images(self, model: OpenModel) -> tuple[ScenePools, list[_Image]]:
        """Choose the images once a model: what is compressed is compared on those of the original."""
        if self._chosen is None or self._chosen[0] != model.source.id:
            known = self._given if self._chosen is None else None  # it is of the original, which comes first
            pools = known or scene_pools_of(model, self._calibration, self._seed)
            fidelity, quality = self._settings.fidelity, self._settings.quality
            images = _union(
                None if fidelity is None else pools.held_out.first(fidelity.samples),
                None if quality is None else pools.held_out.first(quality.samples, annotated=True),
            )
            self._chosen = (model.source.id, pools, images)
        return self._chosen[1], self._chosen[2]

    def _embedded(
        self, model: OpenModel, images: Sequence[_Image], progress: Progress
    ) -> Iterator[tuple[_Image, Scene, Tensor]]:
        """Yield every image with its embedding [C, s, s] float32, some images of a forward at a time."""
        parts = (self._settings.fidelity, self._settings.quality)
        asked = max(part.batch_size for part in parts if part is not None)
        size = images_together(model.config, asked)
        starts = range(0, len(images), size)
        for start in track(progress, "segment", starts, len(starts)):
            group = images[start : start + size]
            scenes = [image.scenes.scene(image.index) for image in group]
            found = embeddings(model.module, torch.stack([scene.pixels for scene in scenes])).cpu()
            yield from zip(group, scenes, found, strict=True)

    def _record(self, module: nn.Module, image: _Image, scene: Scene, embedding: Tensor) -> dict[str, Tensor]:
        """Return what the recording keeps of an image: answers of the original, and what it was asked."""
        tensors: dict[str, Tensor] = {}
        asked: list[Tensor] = []
        if image.fidelity:
            assert self._settings.fidelity is not None
            generator = generator_for(self._seed, "prompts", image.name)
            points = random_points(scene, self._settings.fidelity.points, generator)
            answers = [pair for _, *pair in _answers(module, embedding, scene, points)]
            tensors |= {
                "embedding": embedding.contiguous(),
                "points": points,
                "masks": torch.cat([pack(masks) for masks, _ in answers]),
            }
            asked = [points, torch.cat([scores for _, scores in answers])]
        if image.quality:
            annotations = image.annotations()
            overlaps, scores = _against_truth(module, embedding, scene, annotations)
            shares = [float(annotation.mask.mean()) for annotation in annotations]
            tensors |= {"overlaps": overlaps, "shares": torch.tensor(shares)}
            asked = [_clicks(annotations), scores]
        if image.shown:
            # The prompt that the original is surest of: how the result fares has no say in it.
            best = int(asked[1].argmax())
            point = asked[0][best : best + 1].clone()
            masks, _ = best_masks(module, embedding, scene, point)
            tensors |= {"shown": torch.tensor([best]), "shown_point": point, "shown_mask": pack(masks)}
        return tensors


def images_together(config: Mapping[str, Any], asked: int) -> int:
    """Return how many images the encoder takes at once: not more than fit into half a GiB of activations.

    Counted are the scores of one global layer and twice its inner channels, float32. Of images of 1024 pixels
    that is one.

    Args:
        config: of a Segment Anything model, completed.
        asked: at most so many.
    """
    sizes = sam_encoder(config)
    tokens = sizes.side**2
    scores = sizes.heads * tokens**2 if sizes.global_layers or not sizes.window else 0
    return max(1, min(asked, _TOGETHER_BYTES // (4 * (scores + 2 * tokens * sizes.inner))))


def _union(fidelity: SceneSet | None, quality: SceneSet | None) -> list[_Image]:
    """Return the images of both parts, each once; examples are of those with masks, where there are any."""
    found: list[_Image] = []
    with_masks = {} if quality is None else {row: index for index, row in enumerate(quality.rows)}
    for index, row in enumerate(() if fidelity is None else fidelity.rows):
        assert fidelity is not None
        again = with_masks.pop(row, None)
        shown = (index if quality is None else COUNT if again is None else again) < COUNT
        found.append(_Image(len(found), fidelity, index, True, again is not None, shown))
    for index in with_masks.values():
        assert quality is not None
        found.append(_Image(len(found), quality, index, False, True, index < COUNT))
    return found


def _widest(images: Sequence[_Image]) -> SceneSet:
    """Return the set for which the most files were read."""
    return max((image.scenes for image in images), key=lambda scenes: len(scenes.skipped))


def _file(number: int) -> str:
    return f"{number:05d}.safetensors"


def _answers(
    module: nn.Module, embedding: Tensor, scene: Scene, points: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (which points, masks [n, h, w] bool, scores [n] float32), some points at a time."""
    for start in range(0, len(points), _POINTS_AT_ONCE):
        rows = slice(start, start + _POINTS_AT_ONCE)
        yield rows, *best_masks(module, embedding, scene, points[rows])


def _clicks(annotations: Sequence[Annotation]) -> Tensor:
    return torch.tensor([annotation.point for annotation in annotations], dtype=torch.float32)


def _against_truth(
    module: nn.Module, embedding: Tensor, scene: Scene, annotations: Sequence[Annotation]
) -> tuple[Tensor, Tensor]:
    """Return intersections over union with the true masks, and the model's own scores: [n] float32 each."""
    overlaps, scores = [], []
    for rows, masks, rated in _answers(module, embedding, scene, _clicks(annotations)):
        wanted = torch.stack([torch.from_numpy(annotation.mask) for annotation in annotations[rows]])
        overlaps.append(iou(masks, wanted))
        scores.append(rated)
    return torch.cat(overlaps), torch.cat(scores)


def _compare(
    module: nn.Module,
    image: _Image,
    scene: Scene,
    embedding: Tensor,
    stored: Mapping[str, Tensor],
    found: _Found,
) -> None:
    """Add what one image says."""
    if image.fidelity:
        found.total.add(*powers(stored["embedding"], embedding))
        overlaps = [
            iou(unpack(stored["masks"][rows], scene.size), masks)
            for rows, masks, _ in _answers(module, embedding, scene, stored["points"])
        ]
        found.names.append(image.name)
        found.agreement.append(torch.cat(overlaps))
    if image.quality:
        found.shares.append(stored["shares"])
        found.original.append(stored["overlaps"])
        found.result.append(_against_truth(module, embedding, scene, image.annotations())[0])


def _example(
    module: nn.Module, image: _Image, scene: Scene, embedding: Tensor, stored: Mapping[str, Tensor]
) -> MaskExample:
    """Return the masks of both models at the point that the recording chose, and the true one."""
    before = unpack(stored["shown_mask"], scene.size)
    after, _ = best_masks(module, embedding, scene, stored["shown_point"])
    agreement = float(iou(before, after))
    picture, point = image.scenes.image(image.index), stored["shown_point"][0].tolist()
    pair = (before[0].numpy(), after[0].numpy())
    if not image.quality:
        return example(image.name, picture, point, (*pair, None), (agreement, None, None))
    truth = image.annotations()[int(stored["shown"])].mask
    wanted = torch.from_numpy(truth)[None]
    fits = (float(iou(before, wanted)), float(iou(after, wanted)))
    return example(image.name, picture, point, (*pair, truth), (agreement, *fits))


def _account(settings: EvaluateSettings, found: _Found, metrics: dict[str, float]) -> dict[str, Any]:
    """Fill in the metrics, and return the details of both parts."""
    details: dict[str, Any] = {}
    if settings.fidelity is not None:
        metrics["sqnr_db"] = round(found.total.sqnr_db, 4)
        metrics["mask_agreement"] = mean(torch.cat(found.agreement))
        details["fidelity"] = {
            "samples": settings.fidelity.samples,
            "points": settings.fidelity.points,
            **agreement_details(found.names, found.agreement),
        }
    if settings.quality is not None:
        original, result = torch.cat(found.original), torch.cat(found.result)
        before, after = mean(original), mean(result)
        metrics |= {"miou_original": before, "miou": after, "miou_drop": round(before - after, 5)}
        details["quality"] = {
            "samples": settings.quality.samples,
            "masks": len(original),
            "sizes": size_rows(torch.cat(found.shares), original, result),
        }
    return details
