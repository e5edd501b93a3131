"""The search of TinyFusion: choices of blocks are learned together with what recovery could do for them.

One network holds all choices: every item of a batch runs through the blocks of a choice of its own. Its
weights, or low-rank changes of them, learn meanwhile and are thrown away, so the choice that is left is the
one that recovers best, not the one that hurts least at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...calibration.diffusion_loss import DiffusionTask, Noised
from ...calibration.label_dropout import labels_as_given
from ...calibration.sampler import place
from ...calibration.seeds import generator_for
from ...models.gating import Gates, gated
from ...progress import Progress
from ...recipes.depth import TinyFusionSettings
from ...recipes.recovery import TrainingSettings
from ..recovery.loop import Trained, train
from ..recovery.noised import NoisedBatches
from ..recovery.tied import tied_embedders
from .gates import ChoiceGates, Decision, gumbel
from .lora import low_rank

_MODEL, _CHOICES = "model", "choices"


class _Training(TrainingSettings):
    """What the loop goes by."""

    method: ClassVar[str] = TinyFusionSettings.method
    families: ClassVar[frozenset[str]] = TinyFusionSettings.families


class _ChoosingAlone(_Training):
    """The same where nothing but the choice learns."""

    rate_key: ClassVar[str] = "gate_lr"


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        decision: the last one, of the moving average of the logits.
        decisions: finished steps -> the decision then, in order.
        trained: how it went.
        learned: parameters beside the logits that learned meanwhile.
    """

    decision: Decision
    decisions: dict[int, Decision]
    trained: Trained
    learned: int


class _AllChoices(nn.Module):
    """A denoiser with its choices: one module, so that several devices agree on both."""

    def __init__(self, model: nn.Module, choices: ChoiceGates) -> None:
        super().__init__()
        self.model, self.choices = model, choices


@dataclass
class Search:
    """A denoiser of which blocks are chosen; a `loop.Trainable`.

    Attributes:
        module: the denoiser and its choices.
        trained: name -> what learns.
        blocks: through which blocks are left out.
        batches: what is trained on.
        task: its loss.
        size: items of a batch.
        seed: of the stage.
    """

    module: _AllChoices
    trained: Mapping[str, nn.Parameter]
    blocks: Gates
    batches: NoisedBatches
    task: DiffusionTask
    size: int
    seed: int

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the logits and what learns beside them."""
        return self.trained

    def batch(self, step: int, part: int, parts: int) -> tuple[int, Noised, Tensor]:
        """Return the step, a part of its noised latents, and the numbers that their choices are drawn by."""
        count = self.size // parts
        rows = range(part * count, (part + 1) * count)
        generators = [generator_for(self.seed, "choices", step, row) for row in rows]
        return step, self.batches(step, part, parts), gumbel(self.module.choices.numbers, generators)

    def loss(self, batch: tuple[int, Noised, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss that the denoiser was trained with, how sure the least sure choice is, to show)."""
        step, noised, noise = batch
        device = self.module.choices.logits[0].device
        self.blocks.masks = self.module.choices.masks(noise.to(device), step)
        call = place(noised.call, self.module.model)
        output: Tensor = self.module.model(**call, return_dict=False)[0]
        self.blocks.masks = {}
        with torch.autocast(output.device.type, enabled=False):
            least = min(self.module.choices.decide(step).confidences)
            return self.task.loss(output, noised), {"least confidence": torch.tensor(least, device=device)}


def search(
    module: nn.Module,
    class_name: str,
    choices: ChoiceGates,
    settings: TinyFusionSettings,
    *,
    batches: NoisedBatches,
    task: DiffusionTask,
    seed: int,
    key: str,
    folder: Path,
    progress: Progress,
) -> Found:
    """Learn which blocks should stay; the module is bit for bit what it was afterwards.

    Args:
        module: the denoiser, dense.
        class_name: of its stock class.
        choices: on the CPU, at their start.
        settings: of the stage.
        batches: what is trained on, of `settings.batch_size` items.
        task: its loss.
        seed: of the stage.
        key: content hash of everything else that the result depends on.
        folder: holds the state of the search, from which a killed run goes on.
        progress: of the stage.

    Raises:
        PlanError, StageError: as `loop.train`.
    """
    with ExitStack() as stack:
        stack.enter_context(borrowed(module, copied=settings.mode == "full"))
        stack.enter_context(labels_as_given(module))
        stack.enter_context(tied_embedders(module, class_name))
        weights = stack.enter_context(_learning(module, settings, seed))
        blocks = stack.enter_context(gated(module, class_name))
        choices.to(next(module.parameters()).device)
        logits = {f"{_CHOICES}.{name}": item for name, item in choices.named_parameters()}
        learner = Search(
            _AllChoices(module, choices), {**logits, **weights}, blocks, batches, task,
            settings.batch_size, seed,
        )  # fmt: skip
        every = interval(settings.steps)

        def watch(done: int, values: Mapping[str, Tensor]) -> Sequence[float] | None:
            if done % every and done != settings.steps:
                return None
            found = choices.decide(done - 1, [values[name] for name in logits])
            return [done, *found.choices, *found.confidences]

        rate = settings.gate_lr if settings.mode == "frozen" else settings.lr
        trained = train(
            learner, _training(settings, rate), steps=settings.steps, seed=seed, key=key, folder=folder,
            progress=progress, factors=dict.fromkeys(logits, settings.gate_lr / rate), watch=watch,
        )  # fmt: skip
    decisions = {int(row[0]): _decision(row[1:]) for row in trained.rows}
    learned = sum(item.numel() for item in weights.values())
    return Found(decisions[settings.steps], decisions, trained, learned)


def interval(steps: int) -> int:
    """Return the steps from one note of the decision to the next: 100, but twenty notes of a short search."""
    return max(1, min(100, steps // 20))


def _decision(row: Sequence[float]) -> Decision:
    half = len(row) // 2
    return Decision(tuple(int(choice) for choice in row[:half]), tuple(row[half:]))


def _training(settings: TinyFusionSettings, rate: float) -> _Training:
    """Return what the loop goes by: a constant rate, and no weight decay."""
    kind = _ChoosingAlone if settings.mode == "frozen" else _Training
    return kind(
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        lr=rate,
        min_lr=rate,
        warmup=0.0,
        weight_decay=0.0,
        clip_norm=settings.clip_norm,
        ema=settings.decay or None,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
    )


@contextmanager
def _learning(
    module: nn.Module, settings: TinyFusionSettings, seed: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield name -> what learns beside the choice, by the mode of the settings."""
    with ExitStack() as stack:
        own: dict[str, nn.Parameter] = {}
        if settings.mode == "full":
            own = {name: item for name, item in module.named_parameters() if item.is_floating_point()}
        if settings.mode == "lora":
            lora = settings.lora
            own = stack.enter_context(low_rank(module, rank=lora.rank, alpha=lora.alpha, seed=seed))
        yield {f"{_MODEL}.{name}": item for name, item in own.items()}


@contextmanager
def borrowed(module: nn.Module, *, copied: bool) -> Iterator[None]:
    """Let a module compute in float32; afterwards its tensors are the very ones that they were.

    Args:
        module: its tensors may be changed meanwhile if they are copies.
        copied: whether they are, also where they are float32 already.
    """
    named: Iterator[Any] = chain(module.parameters(), module.buffers())
    tensors = [(tensor, tensor.data) for tensor in named if tensor.is_floating_point()]
    try:
        for tensor, values in tensors:
            tensor.data = values.to(torch.float32, copy=copied)
        yield
    finally:
        for tensor, values in tensors:
            tensor.data = values
