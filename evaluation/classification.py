"""Compare a compressed classifier with its original, on images that nothing was calibrated or trained on.

Both see the same images. The logits say how far the outputs are apart (SQNR), the distributions of the
class how far the predictions are (KL divergence, share of equal answers), and the labels how good the
answers are (accuracy of both).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..calibration.classification import warn_of_left_out
from ..calibration.content import content_key
from ..calibration.image_sets import ImageSet, Pools
from ..calibration.images import pools_of
from ..calibration.labels import class_names
from ..calibration.sampler import place
from ..errors import SourceError
from ..models.base import OpenModel
from ..progress import Progress, step, track
from ..recipes.schema import CalibrationSettings, EvaluateSettings
from ..runtime.hashes import digest
from .evaluator import Evaluation
from .layers import Powers, compare_layers, layer_rows, record_layers
from .metrics import class_agreement, powers
from .reference import LAYERS, VERSION, Reference, recorded
from .size import linear_inventory

LOGITS_FILE = "logits.safetensors"
_LOGITS = "logits"
_LAYER_IMAGES = 8
_SHOWN = 3


class ClassificationEvaluator:
    """Measures by the recipe's settings; deterministic for a seed.

    Args:
        settings: what to measure.
        seed: of the run.
        calibration: the images, and how they are divided.
        pools: of `pools_of` for the original, where they were found already.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        seed: int,
        calibration: CalibrationSettings,
        pools: Pools | None = None,
    ) -> None:
        self._settings, self._seed, self._calibration = settings, seed, calibration
        self._given = pools
        self._found: tuple[str, Pools, ImageSet] | None = None

    def reference(
        self, model: OpenModel, cache: Path | None, progress: Progress, *, fresh: bool = False
    ) -> Reference:
        """Record the original's logits.

        Args:
            model: before any stage.
            cache: folder that keeps recordings by content hash; None keeps nothing.
            progress: told about it, and about images that cannot be read.
            fresh: record anew also where a recording is kept, and replace that.

        Raises:
            SourceError: the images do not fit the model, or there are too few, or labels are missing.
        """
        if self._samples() == 0:
            return recorded(cache, digest([model.source.id, "nothing"]), lambda _: {}, fresh=fresh)
        pools, images = self._images(model)
        if self._settings.quality is not None and images.labels is None:
            raise SourceError(
                f"{pools.held_out.path}: the images have no labels, so accuracy cannot be measured",
                hint="leave out evaluate.quality, or give labels",
            )
        warn_of_left_out(images, pools.held_out.path.as_posix(), progress)
        absent = absent_classes(model, pools) if self._settings.quality is not None else []
        if absent:
            progress.note(f"accuracy: {_absent_note(absent)}")

        def record(folder: Path) -> dict[str, Any]:
            with step(progress, "record the original"):
                logits = self._logits(model, images, progress)
                save_file({_LOGITS: logits}, folder / LOGITS_FILE)
                if self._settings.layers and self._settings.fidelity is not None:
                    record_layers(
                        model, _call(model, images, _layer_images(images)), folder / LAYERS / "00000"
                    )
            return {"images": len(images)}

        chosen = {
            "version": VERSION, "evaluate": self._settings.model_dump(mode="json"), "images": images.key,
        }  # fmt: skip
        return recorded(cache, content_key(model, chosen), record, fresh=fresh)

    def compare(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model as it is now against the recording.

        Args:
            model: after the stages.
            reference: what `reference` returned for the original.
            progress: told about it.
        """
        result = Evaluation(details={"linears": linear_inventory(model)})
        if self._samples() == 0:
            return result
        self._measure(model, reference, result, progress)
        path = reference.layers().get(0)
        if path is not None:
            with step(progress, "error per layer"):
                sums: dict[str, Powers] = {}
                _, images = self._images(model)
                compare_layers(model, _call(model, images, _layer_images(images)), path, sums)
            # Nothing where pruning changed the width of the stream: no block takes the original's input.
            if sums:
                result.details["layers"] = layer_rows(model, sums)
        return result

    def between(self, model: OpenModel, reference: Reference, progress: Progress) -> Evaluation:
        """Measure the model between two stages; nothing by layers.

        Args:
            model: as it is now.
            reference: what `reference` returned for the original.
            progress: told about it.
        """
        result = Evaluation()
        if self._samples():
            self._measure(model, reference, result, progress)
        return result

    def _measure(
        self, model: OpenModel, reference: Reference, result: Evaluation, progress: Progress
    ) -> None:
        pools, images = self._images(model)
        before = load_file(reference.folder / LOGITS_FILE)[_LOGITS]
        with step(progress, "answers on the same images"):
            after = self._logits(model, images, progress)
        fidelity, quality = self._settings.fidelity, self._settings.quality
        result.details["images"] = {
            "held_out": len(pools.held_out.order),
            "skipped": len(images.skipped),
            "copies": pools.train.copies,
            "seed": self._seed,
        }
        if fidelity is not None:
            rows = slice(fidelity.samples)
            result.metrics |= closeness(before[rows], after[rows])
            result.details["fidelity"] = {"samples": fidelity.samples}
        if quality is not None and images.labels is not None:
            rows = slice(quality.samples)
            labels = images.labels[rows]
            result.metrics |= accuracies(before[rows], after[rows], labels)
            result.details["quality"] = {
                "samples": quality.samples,
                "absent_classes": absent_classes(model, pools),
                "per_class": per_class(before[rows], after[rows], labels, class_names(model.config)),
            }

    def _samples(self) -> int:
        """Return how many images are measured on."""
        parts = (self._settings.fidelity, self._settings.quality)
        return max((part.samples for part in parts if part is not None), default=0)

    def _batch_size(self) -> int:
        parts = (self._settings.fidelity, self._settings.quality)
        return max(part.batch_size for part in parts if part is not None)

    def _images(self, model: OpenModel) -> tuple[Pools, ImageSet]:
        """Choose the images once a model: what is compressed is compared on those of the original."""
        if self._found is None or self._found[0] != model.source.id:
            known = self._given if self._found is None else None  # it is of the original, which comes first
            pools = known or pools_of(model, self._calibration, self._seed)
            self._found = (model.source.id, pools, pools.held_out.first(self._samples()))
        return self._found[1], self._found[2]

    def _logits(self, model: OpenModel, images: ImageSet, progress: Progress) -> Tensor:
        """Return [n, classes] float32 on the CPU."""
        size = self._batch_size()
        starts = range(0, len(images), size)
        return torch.cat(
            [
                _logits(model, images, range(start, min(start + size, len(images))))
                for start in track(progress, "classify", starts, len(starts))
            ]
        )


def closeness(before: Tensor, after: Tensor) -> dict[str, float]:
    """Return sqnr_db, kl and top1_agreement of two models' logits, [n, classes] float32 each."""
    total = Powers()
    total.add(*powers(before, after))
    wanted, given = F.log_softmax(before.double(), dim=1), F.log_softmax(after.double(), dim=1)
    divergence = float((wanted.exp() * (wanted - given)).sum(dim=1).mean())
    return {
        "sqnr_db": round(total.sqnr_db, 4),
        "kl": round(max(divergence, 0.0), 6),
        "top1_agreement": round(class_agreement(after.argmax(dim=1), before.argmax(dim=1)), 5),
    }


def accuracies(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy_original, accuracy and accuracy_drop.

    Args:
        before, after: logits [n, classes] of the original and of what was made of it.
        labels: [n] int64.
    """
    shares = [class_agreement(logits.argmax(dim=1), labels) for logits in (before, after)]
    return {
        "accuracy_original": round(shares[0], 5),
        "accuracy": round(shares[1], 5),
        "accuracy_drop": round(shares[0] - shares[1], 5),
    }


def per_class(before: Tensor, after: Tensor, labels: Tensor, names: list[str]) -> list[dict[str, Any]]:
    """Return a row for each class that occurs: class, images, original, compressed (shares 0-1)."""
    rows = []
    for label in labels.unique().tolist():
        of_class = labels == label
        original, compressed = (
            class_agreement(logits[of_class].argmax(dim=1), labels[of_class]) for logits in (before, after)
        )
        rows.append(
            {
                "class": names[label],
                "images": int(of_class.sum()),
                "original": round(original, 5),
                "compressed": round(compressed, 5),
            }
        )
    return rows


def absent_classes(model: OpenModel, pools: Pools) -> list[str]:
    """Return the names of the model's classes of which no image is held out; none without labels."""
    labels = pools.held_out.labels
    if labels is None:
        return []
    there = set(labels[list(pools.held_out.order)].tolist())
    return [name for number, name in enumerate(class_names(model.config)) if number not in there]


def _absent_note(absent: list[str]) -> str:
    shown = ", ".join(map(repr, absent[:_SHOWN])) + (", ..." if len(absent) > _SHOWN else "")
    which = "class has" if len(absent) == 1 else "classes have"
    return f"{len(absent):,} {which} no held-out image ({shown}), so it says nothing of them"


def _layer_images(images: ImageSet) -> range:
    return range(min(_LAYER_IMAGES, len(images)))


def _call(model: OpenModel, images: ImageSet, rows: range) -> dict[str, Any]:
    return place({"pixel_values": images.pixels(rows)}, model.module)


@torch.no_grad()
def _logits(model: OpenModel, images: ImageSet, rows: range) -> Tensor:
    logits: Tensor = model.module(**_call(model, images, rows), return_dict=False)[0]
    return logits.float().cpu()
