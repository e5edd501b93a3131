"""A pruned encoder that learns from what it was: one part of a batch, and its loss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....recipes.slimsam import SlimSamSettings
from ....runtime.memory import return_freed_memory
from ...recovery.keeping import KeptPixels
from ...recovery.schedule import item_order
from .features import Squares, Targets, Watched, compare, encoder_of, output_of, teach
from .losses import Phase, bottleneck_loss, embedding_loss, epoch_of, feature_share, output_loss
from .recomputing import recomputing


@dataclass(frozen=True)
class Teachers:
    """Whom an encoder learns from.

    Attributes:
        original: the model before the stage, or its encoder; frozen, in evaluation mode.
        previous: the one after the first aligning, for the second; None in the first.
    """

    original: nn.Module
    previous: nn.Module | None = None


class _Encoder(nn.Module):
    """The encoder in training, in evaluation mode all the time, as its teachers."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def train(self, mode: bool = True) -> _Encoder:
        """Change nothing: dropout would be a noise that the teacher does not have."""
        return self


@dataclass
class Aligning:
    """An encoder in training; a `loop.Trainable`.

    Attributes:
        student: the encoder.
        teachers: see `Teachers`.
        phase: what was pruned.
        images: what is trained on.
        settings: of the stage.
        seed: of the order of the images.
    """

    student: nn.Module
    teachers: Teachers
    phase: Phase
    images: KeptPixels
    settings: SlimSamSettings
    seed: int
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = _Encoder(self.student)
        self._order = item_order(self.seed, len(self.images))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters of the encoder."""
        return dict(self.student.named_parameters())

    def batch(self, step: int, part: int, parts: int) -> tuple[int, Tensor]:
        """Return (step, pixels [n, 3, S, S] float32 of a part of its images)."""
        chosen = self._order(step, self.settings.batch_size).chunk(parts)[part]
        return step, self.images.pixels(chosen.tolist())

    def loss(self, batch: tuple[int, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (mean loss over the images of a part, the mean square of the output where it is not all).

        What has no share in the loss is not computed: without features no hook is set, and the previous
        model does not run.
        """
        # Gradients and moments arise between activations. What these leave would stay in memory in pieces.
        return_freed_memory()
        step, pixels = batch
        share = self.share(step)
        if not share:
            original = self._answer(pixels)
            return output_loss(self._student(pixels), original), {}
        if self.phase == "embedding":
            original, targets = teach(encoder_of(self.teachers.original), pixels, "inside")
            output, squares = self._compare(pixels, "inside", targets)
            loss = embedding_loss(output, original, squares.means(), share)
        else:
            assert self.teachers.previous is not None
            original = self._answer(pixels)
            previous, targets = teach(encoder_of(self.teachers.previous), pixels, "stream")
            output, squares = self._compare(pixels, "stream", targets)
            loss = bottleneck_loss(output, original, previous, squares.means(), share)
        return loss, {"output": output_loss(output, original).detach()}

    def share(self, step: int) -> float:
        """Return the share of the features in the loss of a step."""
        if not self.settings.features:
            return 0.0
        epoch = epoch_of(step, self.settings.batch_size, len(self.images))
        weight, epochs = self.settings.feature_weight, self.settings.feature_epochs
        return feature_share(self.phase, epoch, weight=weight, epochs=epochs)

    @torch.no_grad()
    def _answer(self, pixels: Tensor) -> Tensor:
        return output_of(encoder_of(self.teachers.original), pixels)

    def _student(self, pixels: Tensor) -> Tensor:
        if not self.settings.recompute:
            return output_of(self.student, pixels)
        with recomputing(self.student):
            return output_of(self.student, pixels)

    def _compare(self, pixels: Tensor, watched: Watched, targets: Targets) -> tuple[Tensor, Squares]:
        return compare(self.student, pixels, watched, targets, recompute=self.settings.recompute)
