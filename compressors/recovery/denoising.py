"""What a denoiser learns from: its own loss, the answers of the model that it was, and that one's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.diffusion_loss import DiffusionTask, Noised
from ...calibration.sampler import place
from ...recipes.recovery import MaskedDistillSettings
from .features import block_outputs, feature_losses, feature_weight
from .matching import Pairs
from .noised import NoisedBatches

Outputs = Mapping[tuple[str, int], Tensor]


@dataclass
class Distillation:
    """A denoiser in training; a `loop.Trainable`.

    Attributes:
        module: the denoiser; all its floating-point parameters are trained.
        settings: of the stage.
        batches: what is trained on.
        task: its losses.
        steps: optimizer steps in all.
        teacher: the original, in evaluation mode; None: it is not asked.
        ours: outputs of the blocks in the last forward; see `features.block_outputs`.
        theirs: the same of the teacher.
        pairs: blocks that should put out the same.
    """

    module: nn.Module
    settings: MaskedDistillSettings
    batches: NoisedBatches
    task: DiffusionTask
    steps: int
    teacher: nn.Module | None = None
    ours: Outputs = field(default_factory=dict)
    theirs: Outputs = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all floating-point parameters; one under several names by the first of them."""
        return {name: item for name, item in self.module.named_parameters() if item.is_floating_point()}

    def batch(self, step: int, part: int, parts: int) -> tuple[int, Noised]:
        """Return the step and a part of its noised latents."""
        return step, self.batches(step, part, parts)

    def loss(self, batch: tuple[int, Noised]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (weighted sum of the losses, each of them where there are several)."""
        step, noised = batch
        output = self.module(**place(noised.call, self.module), return_dict=False)[0]
        answer = self._answer(noised)
        terms: dict[str, tuple[float, Tensor]] = {}
        with torch.autocast(output.device.type, enabled=False):
            if self.settings.denoising:
                terms["denoising"] = self.settings.denoising, self.task.loss(output, noised)
            if answer is not None and self.settings.answers:
                found = self.task.distillation_loss(output, answer, noised)
                terms["answers"] = self.settings.answers, found
            if answer is not None and self.settings.features:
                weight = feature_weight(self.settings.features, step, self.steps)
                terms["features"] = weight, self._features()
        loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
        shown = {name: term.detach() for name, (_, term) in terms.items()}
        return loss, shown if len(shown) > 1 else {}

    @torch.no_grad()
    def _answer(self, noised: Noised) -> Tensor | None:
        """Return what the teacher predicts for the very same call, dropped labels included."""
        if self.teacher is None:
            return None
        answer: Tensor = self.teacher(**place(noised.call, self.teacher), return_dict=False)[0]
        return answer

    def _features(self) -> Tensor:
        """Return the mean distance over all pairs of blocks."""
        losses = [
            feature_losses(
                self.ours[name, own],
                self.theirs[name, other],
                mask=self.settings.mask,
                sigmas=self.settings.sigmas,
            ).mean()
            for name, pairs in self.pairs.items()
            for own, other in pairs
        ]
        return torch.stack(losses).mean()


@contextmanager
def watched(
    module: nn.Module, teacher: nn.Module, class_name: str, pairs: Pairs
) -> Iterator[tuple[Outputs, Outputs]]:
    """Yield what the matched blocks of both models put out; see `features.block_outputs`."""
    with ExitStack() as stack:
        found: list[Any] = []
        for index, model in enumerate((module, teacher)):
            places = {name: [pair[index] for pair in chosen] for name, chosen in pairs.items()}
            found.append(stack.enter_context(block_outputs(model, class_name, places)))
        yield found[0], found[1]
