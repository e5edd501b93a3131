"""The aligning of SlimSAM (arXiv 2312.05284): a pruned encoder learns what it computed before.

Adam on the encoder alone, the losses of a batch summed, the rate halved whenever the choice images have
not improved for some epochs; the weights that were best on these images stay. Two points differ from the
released code: no gradient is left over at the end of an epoch (a batch may begin in one pass over the
images and end in the next), and the weights from before the first step compete with those of every epoch,
so that an aligning never ends worse than it began.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from ....calibration.content import hash_weights
from ....calibration.scenes import Scenes
from ....errors import StageError
from ....progress import Progress
from ....recipes.recovery import TrainingSettings
from ....recipes.slimsam import SlimSamSettings
from ....runtime.atomic import atomic_file
from ....runtime.hashes import digest
from ...recovery.best import BestWeights, Choosing, Rows, best_step
from ...recovery.keeping import KeptPixels
from ...recovery.loop import Trained
from ...recovery.loop import train as run_training
from ...recovery.state import DamagedStateError, remove_state, state_key
from .features import encoder_of
from .learning import Aligning, Teachers
from .losses import Phase, epoch_of

_DONE = "aligned.json"


class Judge(Protocol):
    """Who chooses the weights that stay; see `judging.Choice`."""

    @property
    def key(self) -> str:
        """Content hash of what it judges by."""

    def measure(self, module: nn.Module) -> float:
        """Return a value of a whole model."""

    def better(self, value: float, other: float) -> bool:
        """Tell whether one value is better than another."""


@dataclass(frozen=True)
class Aligned:
    """What an aligning did.

    Attributes:
        losses: of every step: mean over the images of its batch, before the step.
        rates: learning rate of every step.
        epochs: (finished steps, value of the choice images, learning rate of the step before), first before
            the first step, then after every epoch and the last step.
        best_step: after which the weights are those that stay.
        best_value: theirs.
        resumed_at: finished steps that were found on disk; all of them where the aligning was done.
        seconds_per_step: mean of the steps of the process that took the last one, with the judging.
    """

    losses: list[float]
    rates: list[float]
    epochs: list[tuple[int, float, float]]
    best_step: int
    best_value: float
    resumed_at: int
    seconds_per_step: float


def rate_after(rows: Rows, judge: Judge, *, lr: float, patience: int) -> float:
    """Return the learning rate by what was noted: halved after every `patience` rows without a new best.

    Args:
        rows: (finished steps, value), in order; the first is from before training.
        judge: which values are better; equal ones are not.
        lr: of the first step.
        patience: rows that may pass; it starts again after a halving.
    """
    best, waited, rate = rows[0][1], 0, lr
    for row in rows[1:]:
        if judge.better(row[1], best):
            best, waited = row[1], 0
            continue
        waited += 1
        if waited == patience:
            rate, waited = rate / 2, 0
    return rate


class _Training(TrainingSettings):
    """What the loop goes by: Adam without decay, and nothing that the schedule of its settings would do."""

    method: ClassVar[str] = SlimSamSettings.method
    families: ClassVar[frozenset[str]] = SlimSamSettings.families


def _training(settings: SlimSamSettings, steps: int) -> _Training:
    return _Training(
        steps=steps,
        batch_size=settings.batch_size,
        accumulate=settings.parts,
        lr=settings.lr,
        min_lr=settings.lr,
        warmup=0.0,
        weight_decay=0.0,
        clip_norm=None,
        precision=settings.precision,
        checkpoint_every=settings.checkpoint_every,
    )


def align(
    student: nn.Module,
    teachers: Teachers,
    phase: Phase,
    train: Scenes,
    choice: Judge,
    settings: SlimSamSettings,
    *,
    steps: int,
    seed: int,
    key: str,
    folder: Path,
    progress: Progress,
) -> Aligned:
    """Train the encoder of a model in place; it holds the best weights afterwards, in its own type.

    A training that was killed goes on with what is in `folder`, to the same bytes; one that was finished
    is not repeated. With `features: false` both phases align the output with the original's alone.

    Args:
        student: the whole model, whose decoder the choice may need; in evaluation mode.
        teachers: whom it learns from; `previous` is needed in the phase "bottleneck" with features.
        phase: what was pruned.
        train: images to train on; none of the choice.
        choice: judges the weights before the first step, after every epoch and after the last step.
        settings: of the stage.
        steps: optimizer steps.
        seed: of the order of the images.
        key: content hash of what the caller knows of; models, images, settings and seed are added to it.
        folder: of this aligning alone; holds its state, the best weights, and the record of its end.
        progress: gets one step with one unit per optimizer step that is left.

    Raises:
        PlanError: as `loop.train`.
        StageError: a loss, a gradient, a weight or a value of the choice is not finite.
    """
    learner = Aligning(encoder_of(student), teachers, phase, KeptPixels(train), settings, seed)
    parameters = learner.parameters()
    full_key = _key(student, teachers, phase, train, choice, settings, [steps, seed, key])
    kept = BestWeights(folder, state_key(full_key, parameters), parameters, choice.better)
    record = _Record(folder / _DONE, full_key)
    aligned = record.read(kept, progress)
    if aligned is None:

        def rate(_: int, rows: Rows) -> float:
            return rate_after(rows, choice, lr=settings.lr, patience=settings.patience)

        trained = run_training(
            learner, _training(settings, steps), steps=steps, seed=seed, key=full_key, folder=folder,
            progress=progress, watch=_Watch(student, choice, settings, len(train), steps),
            choosing=Choosing(choice.better, rate), summed=True,
        )  # fmt: skip
        aligned = _aligned(trained, choice)
        record.write(aligned)
    # In this order: as long as a state stands, so do the weights that it names.
    remove_state(folder)
    kept.settle(aligned.epochs)
    return aligned


@dataclass(frozen=True)
class _Watch:
    """Asks the judge before the first step, at the end of every epoch and after the last step.

    Attributes:
        student: the whole model.
        judge: of the weights.
        settings: of the stage.
        images: of an epoch.
        steps: in all.
    """

    student: nn.Module
    judge: Judge
    settings: SlimSamSettings
    images: int
    steps: int

    def __call__(self, step: int, _: Mapping[str, Tensor]) -> tuple[float, float] | None:
        """Return (finished steps, value), or None in the middle of an epoch.

        Raises:
            StageError: the value is not finite.
        """
        if step not in (0, self.steps) and self._epoch(step) == self._epoch(step - 1):
            return None
        value = self.judge.measure(self.student)
        if not isfinite(value):
            raise StageError(
                f"{self.settings.method}: the choice images have the value {value} after step {step} of"
                f" {self.steps}",
                hint=f"lower lr ({self.settings.lr:g})" if step else "look at the model that is pruned",
            )
        return step, value

    def _epoch(self, step: int) -> int:
        return epoch_of(step, self.settings.batch_size, self.images)


def _aligned(trained: Trained, judge: Judge) -> Aligned:
    best = best_step(trained.rows, judge.better)
    values = {int(row[0]): row[1] for row in trained.rows}
    return Aligned(
        losses=trained.losses,
        rates=trained.rates,
        epochs=[(step, value, trained.rates[max(0, step - 1)]) for step, value in values.items()],
        best_step=best,
        best_value=values[best],
        resumed_at=trained.resumed_at,
        seconds_per_step=trained.seconds_per_step,
    )


def _key(
    student: nn.Module,
    teachers: Teachers,
    phase: Phase,
    train: Scenes,
    choice: Judge,
    settings: SlimSamSettings,
    others: Sequence[Any],
) -> str:
    """Return the content hash of all that an aligning depends on."""
    models = [student, encoder_of(teachers.original)]
    if teachers.previous is not None:
        models.append(encoder_of(teachers.previous))
    told = settings.model_dump(mode="json", exclude={"checkpoint_every"})
    return digest([phase, train.key, choice.key, told, list(map(hash_weights, models)), *others])


@dataclass(frozen=True)
class _Record:
    """What stands of an aligning once it is finished: its numbers; the weights are beside it.

    Attributes:
        path: of the file.
        key: of the aligning.
    """

    path: Path
    key: str

    def write(self, aligned: Aligned) -> None:
        """Write it, whole or not at all."""
        found = {"key": self.key, "aligned": asdict(aligned)}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps({**found, "sha256": digest(found)}) + "\n", encoding="utf-8")

    def read(self, kept: BestWeights, progress: Progress) -> Aligned | None:
        """Take over a finished aligning with its weights; None: it is not finished.

        A record or weights that are damaged are told, and the aligning is done again.
        """
        if not self.path.is_file():
            return None
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            sha256 = found.pop("sha256")
            if sha256 != digest(found) or found["key"] != self.key:
                raise DamagedStateError(f"{self.path}: not the record of this aligning")
            told = found["aligned"]
            epochs = [tuple(row) for row in told["epochs"]]
            aligned = Aligned(**{**told, "epochs": epochs, "resumed_at": len(told["losses"])})
            kept.apply(aligned.best_step)
        except (DamagedStateError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            progress.warn(f"{self.path.name} is not used ({error}); the aligning is done again")
            return None
        return aligned
