"""How good an encoder is on the choice images: by their masks where they have some, else by its output.

These images are not trained on. They choose the step whose weights stay, and when steps become smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ....calibration.scenes import Scene, Scenes
from ....calibration.segmenting import best_masks, embeddings, iou
from ....progress import Progress, SilentProgress, track

KEPT_BYTES = 256 * 2**20
"""Largest size of the original's embeddings that stay in memory: those of 64 images of 1024 pixels."""


@dataclass(frozen=True)
class Verdict:
    """What was measured on all choice images.

    Attributes:
        output_error: mean square between the original's embedding and the model's.
        miou: mean intersection over union with the true masks, from one point each; None: there are none.
    """

    output_error: float
    miou: float | None


class Choice:
    """The choice images, and what the original answers to them.

    The original's embeddings are computed once and kept in float32 on the CPU up to `KEPT_BYTES`; those
    of images beyond are computed each time, so the original has to stay in memory. Masks and pixels are
    read each time. Everything is computed image by image, in float32 where the weights are.

    Args:
        scenes: the images; with masks of all of them, masks decide.
        original: the whole model as it was before, in evaluation mode.
        kept_bytes: see `KEPT_BYTES`.
    """

    def __init__(self, scenes: Scenes, original: nn.Module, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._scenes, self._original = scenes, original
        self._room = kept_bytes
        self._kept: dict[int, Tensor] = {}
        self._masks: int | None = None
        self.by: Literal["miou", "output_error"] = "miou" if scenes.annotated else "output_error"

    @property
    def key(self) -> str:
        """Content hash of the images, their masks and the preprocessing."""
        return self._scenes.key

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self._scenes)

    @property
    def masks(self) -> int | None:
        """How many masks count; None: there are none."""
        if not self._scenes.annotated:
            return None
        if self._masks is None:
            self._masks = sum(len(self._scenes.annotations(index)) for index in range(self.images))
        return self._masks

    def better(self, value: float, other: float) -> bool:
        """Tell whether one value of `measure` is better than another."""
        return value > other if self.by == "miou" else value < other

    def measure(self, module: nn.Module) -> float:
        """Return mIoU (higher is better) or output error (lower is better), as `by` says.

        Args:
            module: a whole model whose encoder puts out what the original's does; in evaluation mode.
        """
        if self.by == "output_error":
            return self.output_error(module)
        found = [self._overlaps(module, *item) for item in self._embedded(module)]
        return float(torch.cat(found).mean())

    def output_error(self, module: nn.Module) -> float:
        """Return the mean square between the original's embedding and the model's, over all elements."""
        found = [self._error(*item) for item in self._embedded(module)]
        return float(torch.stack(found).mean())

    def miou(self, module: nn.Module) -> float | None:
        """Return the mean intersection over union, over all masks; None: there are none."""
        return self.judge(module).miou

    def judge(self, module: nn.Module, progress: Progress | None = None) -> Verdict:
        """Return both with one pass of the encoder; see `measure`.

        Args:
            module: a whole model, in evaluation mode.
            progress: gets one step with one unit per image.
        """
        errors: list[Tensor] = []
        overlaps: list[Tensor] = []
        embedded = self._embedded(module)
        for item in track(progress or SilentProgress(), "choice images", embedded, self.images):
            errors.append(self._error(*item))
            if self._scenes.annotated:
                overlaps.append(self._overlaps(module, *item))
        miou = float(torch.cat(overlaps).mean()) if overlaps else None
        return Verdict(float(torch.stack(errors).mean()), miou)

    def _embedded(self, module: nn.Module) -> Iterator[tuple[int, Scene, Tensor]]:
        """Yield (place, image, what the encoder makes of it: [channels, s, s] float32)."""
        for index in range(self.images):
            scene = self._scenes.scene(index)
            yield index, scene, embeddings(module, scene.pixels[None])[0]

    def _error(self, index: int, scene: Scene, embedding: Tensor) -> Tensor:
        """Return the mean square of one image, a scalar."""
        target = self._kept.get(index)
        if target is None:
            target = embeddings(self._original, scene.pixels[None])[0].cpu()
            if target.nbytes * (len(self._kept) + 1) <= self._room:
                self._kept[index] = target
        return (embedding.cpu() - target).square().mean()

    def _overlaps(self, module: nn.Module, index: int, scene: Scene, embedding: Tensor) -> Tensor:
        """Return the intersection over union of every mask of one image, [n] float32."""
        found = self._scenes.annotations(index)
        points = torch.tensor([item.point for item in found], dtype=torch.float32)
        masks, _ = best_masks(module, embedding, scene, points)
        return iou(masks, torch.stack([torch.from_numpy(item.mask) for item in found]))
