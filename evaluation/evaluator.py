"""Compare a compressed model with its original: fidelity, error per layer, quality of samples.

`reference` records the original before a stage changes it; `compare` measures what came out.

Fidelity has two views. *Teacher-forced*: the compressed denoiser is run on the very inputs that the
original saw along its own trajectories; the ratio of signal to error tells what one call loses.
*Free-running*: both draw whole samples from equal noise; PSNR and SSIM of the final images tell what
is left after the errors of all steps have met.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..calibration.content import condition_content, content_key
from ..calibration.sampler import ClassConditions, Conditions, OnCall, conditions_for, sample
from ..models.base import OpenModel
from ..models.builtin.classifier import Scorer, load_scorer
from ..models.builtin.data import CLASS_NAMES
from ..progress import Progress, step, track
from ..recipes.gates import SPEEDUP
from ..recipes.schema import CalibrationSettings, EvaluateSettings, FidelitySettings, QualitySettings
from .call_store import CallWriter, take, to_device
from .layers import Powers
from .mask_examples import MaskExample
from .metrics import powers, psnr_db, ssim
from .quality import balanced_classes, judge, why_not
from .reference import CALLS, IMAGES_FILE, VERSION, Reference, recorded
from .size import linear_inventory
from .watched import compare_watched, device_of, record_watched

FIDELITY_SEED = 1_000_000
QUALITY_SEED = 2_000_000
"""Added to the recipe's seed: nothing is measured on the noise that a method was calibrated on."""

_LAYER_ITEMS = 2  # samples whose layers are recorded; both guidance branches of each


@dataclass
class Evaluation:
    """What was measured.

    Attributes:
        metrics: name -> value; the names of `recipes.gates.METRICS`.
        details: JSON values for the report: per timestep, per layer, settings, notes.
        images: name -> [n, C, H, W] float32, final samples of equal seeds: ``original`` first, ``compressed``
            last, and between them those of the model as it was between stages, by what they are called.
        labels: one caption per image, or empty.
        masks: of a model that segments, some prompts with the masks of both models.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    masks: tuple[MaskExample, ...] = ()

    def add_speed(self, found: Mapping[str, Any]) -> None:
        """Add what `speed.measure_speed` returned."""
        self.details["speed"] = dict(found)
        self.metrics[SPEEDUP] = found["speedup"]


def _is_pixel_space(model: OpenModel) -> bool:
    return model.config.get("in_channels") in (1, 3)


def _label_names(model: OpenModel, conditions: Conditions) -> list[str]:
    """Return a caption per sample; none for prompts, which an embeddings file does not name."""
    if not isinstance(conditions, ClassConditions):
        return []
    numbers = conditions.labels.tolist()
    if model.source.id.startswith("builtin:") and conditions.null == len(CLASS_NAMES):
        return [CLASS_NAMES[number] for number in numbers]
    return [f"class {number}" for number in numbers]


class Evaluator:
    """Measures by the recipe's settings; deterministic for a seed.

    Args:
        settings: what to measure.
        seed: of the run.
        conditions: where class labels or prompts come from; None: all classes in turn.
    """

    def __init__(
        self, settings: EvaluateSettings, seed: int, conditions: CalibrationSettings | None = None
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._sources = conditions or CalibrationSettings()
        self._chosen: Conditions | None = None

    def reference(
        self, model: OpenModel, cache: Path | None, progress: Progress, *, fresh: bool = False
    ) -> Reference:
        """Record the original.

        Args:
            model: before any stage.
            cache: folder that keeps recordings by content hash; None keeps nothing.
            progress: told about the sampling.
            fresh: record anew also where a recording is kept, and replace that.

        Raises:
            SourceError: prompts or embeddings are missing or cannot be read.
        """
        scorer = load_scorer() if self._settings.quality is not None else None

        def record(folder: Path) -> dict[str, Any]:
            with step(progress, "record the original"):
                return self._record(model, scorer, folder, progress)

        settings = {
            "version": VERSION,
            "evaluate": self._settings.model_dump(mode="json"),
            "conditions": condition_content(model, self._sources),
            "seed": self._seed,
        }
        return recorded(cache, content_key(model, settings), record, fresh=fresh)

    def compare(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model as it is now against the recording.

        Args:
            model: after the stages.
            reference: what `reference` returned for the original.
            progress: told about the sampling.
        """
        result = Evaluation(details={"linears": linear_inventory(model)})
        self._measure(model, reference, result, progress)
        if self._settings.layers and self._settings.fidelity is not None:
            with step(progress, "error per layer"):
                result.details["layers"] = compare_watched(model, reference, _first_items)
        return result

    def between(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model between two stages; nothing by layers.

        Args:
            model: as it is now.
            reference: what `reference` returned for the original.
            progress: told about the sampling.
        """
        result = Evaluation()
        self._measure(model, reference, result, progress)
        return result

    def _measure(
        self, model: OpenModel, reference: Reference, result: Evaluation, progress: Progress
    ) -> None:
        if self._settings.fidelity is not None:
            images = reference.images()["fidelity"]
            with step(progress, "fidelity under equal inputs"):
                self._compare_calls(model, reference, result, progress)
            with step(progress, "fidelity under equal seeds"):
                drawn = self._draw_fidelity(model, self._settings.fidelity, progress)
            self._compare_images(model, images, drawn, result)
            result.labels = tuple(reference.index["labels"])
            result.images = {"original": images, "compressed": drawn}
        if self._settings.quality is not None:
            with step(progress, "quality of samples"):
                self._compare_quality(model, self._settings.quality, reference, result, progress)

    def _record(
        self, model: OpenModel, scorer: Scorer | None, folder: Path, progress: Progress
    ) -> dict[str, Any]:
        images: dict[str, Tensor] = {}
        index: dict[str, Any] = {"labels": [], "quality_skipped": None}
        if self._settings.fidelity is not None:
            writer = CallWriter(folder / CALLS)
            settings = self._settings.fidelity
            images["fidelity"] = self._draw_fidelity(model, settings, progress, on_call=writer.add)
            index["labels"] = _label_names(model, self._fidelity_conditions(model, settings))
            if self._settings.layers:
                record_watched(model, folder, _first_items)
        if self._settings.quality is not None and scorer is not None:
            index["quality_skipped"] = why_not(model, scorer)
            if index["quality_skipped"] is None:
                images["quality"] = self._draw_quality(model, self._settings.quality, scorer, progress)
        if images:
            save_file({name: tensor.contiguous() for name, tensor in images.items()}, folder / IMAGES_FILE)
        return index

    def _fidelity_conditions(self, model: OpenModel, settings: FidelitySettings) -> Conditions:
        """Choose the conditions once: prompts would be encoded again otherwise."""
        if self._chosen is None:
            seed = self._seed + FIDELITY_SEED
            sources = self._sources.model_copy(update={"guidance_scale": settings.guidance_scale})
            self._chosen = conditions_for(model, sources, settings.samples, seed)
        return self._chosen

    def _draw_fidelity(
        self, model: OpenModel, settings: FidelitySettings, progress: Progress, on_call: OnCall | None = None
    ) -> Tensor:
        return sample(
            model,
            self._fidelity_conditions(model, settings),
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=self._seed + FIDELITY_SEED,
            batch_size=settings.batch_size,
            on_call=on_call,
            progress=progress,
        )

    def _draw_quality(
        self, model: OpenModel, settings: QualitySettings, scorer: Scorer, progress: Progress
    ) -> Tensor:
        seed = self._seed + QUALITY_SEED
        every_class = CalibrationSettings(classes=tuple(range(scorer.classes)))
        return sample(
            model,
            conditions_for(model, every_class, settings.samples, seed),
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=seed,
            batch_size=settings.batch_size,
            progress=progress,
        )

    @torch.no_grad()
    def _compare_calls(
        self, model: OpenModel, reference: Reference, result: Evaluation, progress: Progress
    ) -> None:
        device = device_of(model)
        total = Powers()
        steps: dict[float, Powers] = {}
        calls = reference.calls()
        for kwargs, wanted in track(progress, "replay", calls, len(calls)):
            output = model.module(**to_device(kwargs, device), return_dict=False)[0]
            pair = powers(wanted, output.cpu())
            timestep = round(float(kwargs["timestep"].flatten()[0]), 3)
            steps.setdefault(timestep, Powers()).add(*pair)
            total.add(*pair)
        rows = [
            {"timestep": timestep, "sqnr_db": round(value.sqnr_db, 4)} for timestep, value in steps.items()
        ]
        worst = min(rows, key=lambda row: row["sqnr_db"])
        result.metrics["sqnr_db"] = round(total.sqnr_db, 4)
        result.metrics["sqnr_db_worst_step"] = worst["sqnr_db"]
        result.details["timesteps"] = rows
        result.details["worst_timestep"] = worst["timestep"]

    def _compare_images(self, model: OpenModel, original: Tensor, drawn: Tensor, result: Evaluation) -> None:
        if _is_pixel_space(model):
            original, drawn, data_range = original.clamp(-1, 1), drawn.clamp(-1, 1), 2.0
            space = "images, clipped to [-1, 1]"
        else:
            data_range = float(original.max() - original.min())
            space = "latents, whose range is that of the original's samples"
        result.metrics["psnr_db"] = round(psnr_db(original, drawn, data_range), 4)
        result.metrics["ssim"] = round(ssim(original, drawn, data_range), 5)
        assert self._settings.fidelity is not None
        result.details["fidelity"] = {
            **self._settings.fidelity.model_dump(mode="json", exclude={"points"}),
            "seed": self._seed + FIDELITY_SEED,
            "compared": space,
            "data_range": round(data_range, 5),
        }

    def _compare_quality(
        self,
        model: OpenModel,
        settings: QualitySettings,
        reference: Reference,
        result: Evaluation,
        progress: Progress,
    ) -> None:
        skipped = reference.index["quality_skipped"]
        if skipped is not None:
            result.details["quality"] = {"skipped": skipped}
            progress.note(skipped)
            return
        scorer = load_scorer()
        wanted = balanced_classes(settings.samples, scorer.classes)
        before = judge(scorer, reference.images()["quality"], wanted)
        after = judge(scorer, self._draw_quality(model, settings, scorer, progress), wanted)
        result.metrics["class_agreement_original"] = round(before.agreement, 5)
        result.metrics["class_agreement"] = round(after.agreement, 5)
        result.metrics["class_agreement_drop"] = round(before.agreement - after.agreement, 5)
        result.metrics["fid_original"] = round(before.fid, 4)
        result.metrics["fid"] = round(after.fid, 4)
        result.details["quality"] = {
            **settings.model_dump(mode="json"),
            "seed": self._seed + QUALITY_SEED,
            "classifier_test_accuracy": scorer.test_accuracy,
            "fid_floor": scorer.fid_floor,
            "per_class": [
                {"class": name, "original": original, "compressed": compressed}
                for name, original, compressed in zip(
                    CLASS_NAMES, before.per_class, after.per_class, strict=True
                )
            ],
        }


def _layer_items(batch: int) -> Tensor:
    """Return the batch items whose layers are recorded: the first ones of both guidance branches."""
    half = batch // 2
    chosen = {*range(min(_LAYER_ITEMS, batch)), *range(half, min(half + _LAYER_ITEMS, batch))}
    return torch.tensor(sorted(chosen))


def _first_items(model: OpenModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    batch, device = kwargs[model.family.latents].shape[0], device_of(model)
    chosen: dict[str, Any] = to_device(take(kwargs, batch, _layer_items(batch)), device)
    return chosen
