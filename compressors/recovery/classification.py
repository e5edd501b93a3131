"""What a classifier learns from: labels, and the answers of the model that it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...progress import Progress, step
from ...recipes.recovery import DistillSettings, FinetuneSettings
from .augmentation import Draw, draw, mix, transform
from .schedule import item_order

_AUTOCAST: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Images(Protocol):
    """Preprocessed images, as `calibration.images.ImageSet`."""

    @property
    def labels(self) -> Tensor | None:
        """[n] int64; None: there are none."""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """[b, channels, height, width] float32."""

    def __len__(self) -> int:
        """How many there are."""


@dataclass(frozen=True)
class Part:
    """A part of a batch.

    Attributes:
        pixels: [n, channels, height, width] float32, as the model is to see them.
        drawn: of which items.
        labels: [n] int64; None: they are not used.
        partners: labels of the images that are mixed in; None: nothing is.
    """

    pixels: Tensor
    drawn: Draw
    labels: Tensor | None
    partners: Tensor | None


def label_loss(
    logits: Tensor, labels: Tensor, partners: Tensor | None, share: float, smoothing: float
) -> Tensor:
    """Return the mean cross-entropy against labels, or against two of them by their shares.

    Args:
        logits: [n, classes].
        labels: [n] int64.
        partners: [n] int64, with the share 1 - `share`; None: none.
        share: of `labels`.
        smoothing: share of the uniform distribution in the target.
    """
    loss = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    if partners is None:
        return loss
    other = functional.cross_entropy(logits, partners, label_smoothing=smoothing)
    return share * loss + (1.0 - share) * other


def distillation_loss(logits: Tensor, teacher: Tensor, settings: DistillSettings) -> Tensor:
    """Return the mean loss against the teacher's answers.

    soft: T^2 * KL(softmax(teacher / T) || softmax(logits / T)) (arXiv 1503.02531); hard: cross-entropy
    against the teacher's best class (arXiv 2012.12877, without smoothing).

    Args:
        logits: [n, classes].
        teacher: [n, classes].
        settings: `mode`, `temperature`.
    """
    if settings.mode == "hard":
        return functional.cross_entropy(logits, teacher.argmax(-1))
    heat = settings.temperature
    ours = functional.log_softmax(logits / heat, dim=-1)
    theirs = functional.log_softmax(teacher / heat, dim=-1)
    return heat**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def heads(output: Any, *, both: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits that learn from labels, and those that learn from the teacher, in float32.

    A DeiT with two heads learns with each its own. Where there is one source alone, both heads learn
    from it: the model's answer is their mean, and a head that learns nothing would spoil it.

    Args:
        output: of the stock class.
        both: there are labels and a teacher.
    """
    distilled = getattr(output, "distillation_logits", None)
    if distilled is None:
        only = [output.logits.float()]
        return only, only
    first, second = output.cls_logits.float(), distilled.float()
    return ([first], [second]) if both else ([first, second], [first, second])


class Teacher:
    """The original, which answers without learning.

    Its answers are kept where every image is always the same: all of them are computed before training, in
    one order, so that a resumed training sees the same numbers.

    Args:
        module: in evaluation mode.
        settings: whether images change; in which precision it computes.
    """

    def __init__(self, module: nn.Module, settings: FinetuneSettings) -> None:
        self._module, self._settings = module.eval().requires_grad_(False), settings
        self._kept: Tensor | None = None

    def prepare(self, images: Images, steps: int, progress: Progress) -> None:
        """Answer all images now, where that saves work."""
        changing = self._settings.augment or self._settings.mixup
        if changing or steps * self._settings.batch_size < len(images):
            return
        size = self._settings.batch_size // self._settings.accumulate
        answers: list[Tensor] = []
        with step(progress, "answers of the original", len(images)) as items:
            for start in range(0, len(images), size):
                indices = range(start, min(start + size, len(images)))
                answers.append(self._answer(images.pixels(indices)))
                items.advance(len(indices))
        self._kept = torch.cat(answers)

    def logits(self, part: Part) -> Tensor:
        """Return [n, classes] float32 for a part of a batch."""
        return self._answer(part.pixels) if self._kept is None else self._kept[part.drawn.items]

    @torch.no_grad()
    def _answer(self, pixels: Tensor) -> Tensor:
        weight = next(self._module.parameters())
        with _autocast(self._settings.precision, weight.device):
            output = self._module(pixel_values=pixels.to(weight.device, weight.dtype))
        found: Tensor = output.logits.float()
        return found


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    dtype = _AUTOCAST.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


class Classification:
    """A classifier in training; a `loop.Trainable`.

    Args:
        module: the classifier; all its floating-point parameters are trained.
        settings: of the stage.
        images: with labels, unless the teacher has the whole weight.
        teacher: None: labels alone.
        seed: of the stage.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: FinetuneSettings,
        images: Images,
        teacher: Teacher | None,
        seed: int,
    ) -> None:
        self.module = module
        self._settings, self._images, self._teacher, self._seed = settings, images, teacher, seed
        self._order = item_order(seed, len(images))
        self._weight = settings.distill.weight if settings.distill is not None else 0.0
        self._labels = images.labels if self._weight < 1.0 else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all floating-point parameters."""
        return {name: item for name, item in self.module.named_parameters() if item.is_floating_point()}

    def batch(self, step: int, part: int, parts: int) -> Part:
        """Return a part of the images of a step, changed as was drawn for them."""
        drawn = draw(self._settings, self._order, self._seed, step).part(part, parts)
        pixels, labels = self._seen(drawn)
        if drawn.partners is None:
            return Part(pixels, drawn, labels, None)
        others, partners = self._seen(drawn.partners)
        return Part(mix(pixels, others, drawn.share), drawn, labels, partners)

    def _seen(self, drawn: Draw) -> tuple[Tensor, Tensor | None]:
        pixels = transform(self._images.pixels(drawn.items.tolist()), drawn.mirrored, drawn.moved)
        return pixels, None if self._labels is None else self._labels[drawn.items]

    def loss(self, batch: Part) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (weighted mean loss of a part, its two terms where there are two)."""
        device = next(self.module.parameters()).device
        output = self.module(pixel_values=batch.pixels.to(device))
        labelled, distilled = heads(output, both=0.0 < self._weight < 1.0)
        with torch.autocast(device.type, enabled=False):
            terms: dict[str, tuple[float, Tensor]] = {}
            if batch.labels is not None:
                labels = batch.labels.to(device)
                partners = None if batch.partners is None else batch.partners.to(device)
                share, smoothing = batch.drawn.share, self._settings.label_smoothing
                terms["labels"] = (
                    1.0 - self._weight,
                    _mean([label_loss(logits, labels, partners, share, smoothing) for logits in labelled]),
                )
            if self._teacher is not None and self._settings.distill is not None:
                answers = self._teacher.logits(batch).to(device)
                terms["original"] = (
                    self._weight,
                    _mean([distillation_loss(one, answers, self._settings.distill) for one in distilled]),
                )
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        shown = {name: term.detach() for name, (_, term) in terms.items()}
        return loss, shown if len(shown) > 1 else {}


def _mean(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean()
