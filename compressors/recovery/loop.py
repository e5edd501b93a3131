"""The training loop of all recovery stages, on accelerate: several devices when it was launched so.

Everything random in a step follows from (seed, step, part), and the state on disk is ours (accelerate's
own is a pickle). So on a CPU with as many threads a killed run ends with the very bytes of one that was
not. There is no early stopping: the last step is the result, or the moving average of all, or the best of
the values that a caller notes (`best.Choosing`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice, product
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...calibration.seeds import generator_for
from ...errors import PlanError, StageError
from ...progress import Progress, step
from ...recipes.recovery import TrainingSettings
from .ahead import one_ahead
from .best import BestWeights, Choosing, best_step
from .ema import MovingAverage
from .optimizer import adamw, set_rate
from .schedule import learning_rate
from .state import DamagedStateError, TrainingState, read_state, state_key, write_state
from .weights import training

Watch = Callable[[int, Mapping[str, Tensor]], Sequence[float] | None]
"""(finished steps, weights or their moving average) -> numbers to keep; None: nothing of this step."""
_Batches = Iterator[tuple[tuple[int, int], Any]]
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
# Every process has the whole model: what the state on disk and the moving average go by.
_LAUNCHED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainable(Protocol):
    """What is trained, on what, and towards what."""

    @property
    def module(self) -> nn.Module:
        """The module; its parameters are those that are trained, or more."""

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return name -> parameter of those that are trained, in a fixed order."""

    def batch(self, step: int, part: int, parts: int) -> Any:
        """Return part `part` of `parts` equal parts of a step's batch; a pure function.

        What is drawn for the whole batch must not depend on `parts`. It is called from another thread,
        while the part before is computed.
        """

    def loss(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return (mean loss over the items of a part, with its graph; detached numbers to show)."""


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        losses: mean loss of every step's batch, before the step.
        rates: learning rate of every step.
        resumed_at: finished steps that were found on disk.
        seconds_per_step: mean over the steps of this process; 0 where there was none left.
        rows: what was noted on the way, of steps before a kill as well.
    """

    losses: list[float]
    rates: list[float]
    resumed_at: int
    seconds_per_step: float
    rows: list[list[float]] = field(default_factory=list)


def train(
    trainable: Trainable,
    settings: TrainingSettings,
    *,
    steps: int,
    seed: int,
    key: str,
    folder: Path,
    progress: Progress,
    factors: Mapping[str, float] | None = None,
    watch: Watch | None = None,
    choosing: Choosing | None = None,
    summed: bool = False,
) -> Trained:
    """Train in place; go on with the state in `folder` where there is one.

    Args:
        trainable: its parameters are float32 meanwhile and come back in their own type, rounded once.
        settings: of the stage.
        steps: optimizer steps in all.
        seed: of the stage.
        key: content hash of everything else that the result depends on.
        folder: holds the state; of this training alone.
        progress: gets one step with one unit per step that is left.
        factors: name of a parameter -> what the learning rate is multiplied by for it; None: 1 for all.
        watch: is called after every step; what it returns is kept with the state, rows of equal length.
        choosing: the result has the weights of the best row, and learning rates follow from the rows, not
            from the schedule of the settings. `watch` is then called before the first step too, and its
            rows begin with (finished steps, value); there is no moving average.
        summed: gradients are those of the sum over the items of a batch, not of their mean; what is
            recorded stays the mean.

    Raises:
        PlanError: the device cannot compute in the precision, or the batch does not divide.
        StageError: a loss, a gradient or a trained weight is not finite; the last state stays on disk.
    """
    parameters = trainable.parameters()
    if not parameters:
        raise StageError("nothing to train: the model has no parameter left that is trained")
    device = next(iter(parameters.values())).device
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    with training(trainable.module, parameters), _accelerator(settings, device) as accelerator:
        run = _Loop(trainable, settings, steps, seed, accelerator, factors, watch, choosing, summed)
        trained = run.go(state_key(key, parameters), folder, progress)
        _refuse_overflow(parameters, dtypes, settings)
        return trained


@torch.no_grad()
def _refuse_overflow(
    parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype], settings: TrainingSettings
) -> None:
    """Look at the weights after the last step, which no loss has seen, as they are going to be stored.

    Raises:
        StageError: one is not finite, or too large for its type; with its name.
    """
    for name, parameter in parameters.items():
        stored = dtypes[name]
        if parameter.to(stored).isfinite().all():
            continue
        kind = str(stored).removeprefix("torch.")
        if parameter.isfinite().all():
            largest = float(parameter.abs().max())
            raise StageError(
                f"{settings.method}: {name} has the value {largest:.4g} after training, too large for {kind}",
                hint=f"lower {_rate(settings)}, or load the model with dtype: bfloat16 or float32",
            )
        raise StageError(
            f"{settings.method}: {name} is not finite after the last step", hint=f"lower {_rate(settings)}"
        )


def _rate(settings: TrainingSettings) -> str:
    """Return the learning rate as a recipe names it."""
    return f"{settings.rate_key} ({settings.lr:g})"


@contextmanager
def _accelerator(settings: TrainingSettings, device: torch.device) -> Iterator[Accelerator]:
    """Yield an accelerator; what it keeps for the whole process is forgotten afterwards if it was not there.

    Raises:
        PlanError: the device cannot compute in the precision, or it was launched in shards.
    """
    if settings.precision == "float16" and device.type == "cpu":
        raise PlanError(
            f"{settings.method}: precision float16 needs a GPU, and the model is on the CPU",
            hint="write precision: bfloat16, or float32",
        )
    fresh = not PartialState._shared_state and not AcceleratorState._shared_state
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=_PRECISIONS[settings.precision],
        # The plugin, not the number: the number yields to a variable of the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.accumulate, sync_with_dataloader=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    try:
        if accelerator.distributed_type not in _LAUNCHED:
            raise PlanError(
                f"{settings.method}: cannot train when launched as {accelerator.distributed_type.value}",
                hint="launch with one whole copy of the model per device (--multi_gpu or --cpu)",
            )
        yield accelerator
    finally:
        accelerator.free_memory()
        GradientState._reset_state()
        if fresh and accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


class _Losses(nn.Module):
    """The loss as a module: accelerate wraps this, so the model itself is never changed."""

    def __init__(self, trainable: Trainable) -> None:
        super().__init__()
        self.module = trainable.module
        self._loss = trainable.loss

    def forward(self, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what `Trainable.loss` returns."""
        return self._loss(batch)


class _Loop:
    """One training; see `train`."""

    def __init__(
        self,
        trainable: Trainable,
        settings: TrainingSettings,
        steps: int,
        seed: int,
        accelerator: Accelerator,
        factors: Mapping[str, float] | None,
        watch: Watch | None,
        choosing: Choosing | None,
        summed: bool,
    ) -> None:
        self._watch, self._choosing = watch, choosing
        self._best: BestWeights | None = None
        self._scale = settings.batch_size if summed else 1
        self._trainable, self._settings, self._steps = trainable, settings, steps
        self._seed, self._accelerator = seed, accelerator
        self._parameters = trainable.parameters()
        self._parts = settings.accumulate * accelerator.num_processes
        if settings.batch_size % self._parts:
            raise PlanError(
                f"{settings.method}: batch_size {settings.batch_size} has not {self._parts} equal parts"
                f" ({settings.accumulate} on each of {accelerator.num_processes} devices)",
                hint="change batch_size or accumulate",
            )
        self._inner = adamw(self._parameters, settings, factors)
        self._losses = accelerator.prepare_model(_Losses(trainable))
        self._optimizer = accelerator.prepare_optimizer(self._inner, device_placement=False)
        self._average = MovingAverage(self._parameters, settings.ema) if settings.ema is not None else None
        self._kept = 0

    def go(self, key: str, folder: Path, progress: Progress) -> Trained:
        """Take all steps that are left."""
        state = TrainingState(key, self._parameters, self._inner, self._average, [], self._accelerator.scaler)
        if self._choosing is not None:
            main = self._accelerator.is_main_process
            self._best = BestWeights(folder, key, self._parameters, self._choosing.better, writes=main)
        start = self._begin(folder, state, progress)
        began = time.monotonic()
        turns = product(range(start, self._steps), range(self._settings.accumulate))
        with (
            step(progress, "training", self._steps - start) as steps,
            closing(one_ahead(self._batch, turns)) as batches,
        ):
            for number in range(start, self._steps):
                rate = self._rate_of(number, state.rows)
                loss, shown = self._step(number, rate, batches)
                state.losses.append(loss)
                done = number + 1
                self._note(done, state)
                if done % self._settings.checkpoint_every == 0 and done < self._steps:
                    self._keep(folder, state)
                steps.advance(1, _shown(done, self._steps, loss, rate, shown))
        seconds = time.monotonic() - began
        if self._average is not None:
            self._average.apply()
        self._take_best(state.rows)
        rates = [self._rate_of(number, state.rows) for number in range(self._steps)]
        mean_seconds = seconds / max(1, self._steps - start)
        return Trained(state.losses, rates, start, mean_seconds, state.rows)

    def _begin(self, folder: Path, state: TrainingState, progress: Progress) -> int:
        """Go on with a kept state, or start; return how many steps are finished."""
        best = self._best
        try:
            start = read_state(folder, state, None if best is None else best.check)
        except DamagedStateError as error:
            progress.warn(f"{error.message}; the training starts over")
            start = 0
        self._accelerator.wait_for_everyone()  # all have read what one of them is going to replace
        self._kept = start
        if start:
            progress.note(f"training goes on after step {start} of {self._steps}")
        if best is not None:
            best.settle(state.rows)
            if not start:
                self._note(0, state)
        return start

    def _rate_of(self, number: int, rows: Sequence[Sequence[float]]) -> float:
        """Return the learning rate of a step, from 0, by what was noted before it."""
        if self._choosing is None:
            return learning_rate(self._settings, number, self._steps)
        return self._choosing.rate(number, [row for row in rows if row[0] <= number])

    def _note(self, done: int, state: TrainingState) -> None:
        """Let the caller look at the weights, and keep what it notes."""
        if self._watch is None:
            return
        row = self._watch(done, self._parameters if self._average is None else self._average.tensors)
        if row is None:
            return
        # Devices may round differently, and all have to take the same steps.
        state.rows.append(broadcast_object_list([list(row)])[0])
        if self._best is not None:
            self._best.offer(state.rows)

    def _take_best(self, rows: Sequence[Sequence[float]]) -> None:
        """End with the weights of the best row, where that is asked for.

        Raises:
            StageError: they cannot be read.
        """
        if self._best is None or self._choosing is None:
            return
        self._accelerator.wait_for_everyone()  # one process writes them
        try:
            self._best.apply(best_step(rows, self._choosing.better))
        except DamagedStateError as error:
            raise StageError(
                f"{self._settings.method}: {error.message}", hint="run it again; the training starts over"
            ) from None

    def _part(self, turn: int) -> int:
        """Return which part of a batch this process computes in a turn."""
        return turn * self._accelerator.num_processes + self._accelerator.process_index

    def _batch(self, place: tuple[int, int]) -> Any:
        number, turn = place
        return self._trainable.batch(number, self._part(turn), self._parts)

    def _step(self, number: int, rate: float, batches: _Batches) -> tuple[float, dict[str, float]]:
        """Take one optimizer step; return its loss and what else is shown."""
        accelerator = self._accelerator
        set_rate(self._inner, rate)
        total = torch.zeros((), device=accelerator.device)
        sums: dict[str, Tensor] = {}
        for (_, turn), batch in islice(batches, self._settings.accumulate):
            with (
                accelerator.accumulate(self._losses),
                _randomness(self._seed, number, self._part(turn), accelerator.device),
                _attention(self._settings, accelerator.device),
            ):
                loss, numbers = self._losses(batch)
                total += loss.detach() / self._settings.accumulate
                for name, value in numbers.items():
                    sums[name] = sums.get(name, torch.zeros_like(total)) + value / self._settings.accumulate
                self._refuse(float(loss.detach()), number, "loss")
                accelerator.backward(loss * self._scale)
                if accelerator.sync_gradients:
                    self._clip(number)
                self._optimizer.step()
                self._optimizer.zero_grad()
        if self._average is not None:
            self._average.update(number)
        return self._mean(total), {name: self._mean(value) for name, value in sums.items()}

    def _clip(self, number: int) -> None:
        """Hold the gradient to its largest norm, and refuse one that is not finite."""
        limit = self._settings.clip_norm
        norm = self._accelerator.clip_grad_norm_(
            list(self._parameters.values()), float("inf") if limit is None else limit
        )
        if (
            self._accelerator.scaler is None
        ):  # with one, a step that overflows is left out, with a lower scale
            self._refuse(float(norm), number, "gradient")

    def _refuse(self, value: float, number: int, what: str) -> None:
        """Stop where a value is not finite.

        Raises:
            StageError: with the step.
        """
        if isfinite(value):
            return
        clip = "set clip_norm" if self._settings.clip_norm is None else "clip_norm"
        advice = "" if self._settings.precision == "float32" else ", or write precision: float32"
        again = f"goes on after step {self._kept}" if self._kept else "starts over"
        raise StageError(
            f"{self._settings.method}: the {what} of step {number + 1} of {self._steps} is not finite",
            hint=f"lower {_rate(self._settings)} or {clip}{advice}; with that the stage starts over, and"
            f" finished stages before it are used again. Unchanged, it {again}",
        )

    def _mean(self, value: Tensor) -> float:
        """Return the mean over all devices."""
        return float(self._accelerator.reduce(value.detach().float(), reduction="mean"))

    def _keep(self, folder: Path, state: TrainingState) -> None:
        if self._accelerator.is_main_process:
            write_state(folder, state)
        if self._best is not None:
            self._best.settle(state.rows)
        self._kept = len(state.losses)
        self._accelerator.wait_for_everyone()


@contextmanager
def _randomness(seed: int, number: int, part: int, device: torch.device) -> Iterator[None]:
    """Give dropout numbers of its own for one part of one step, and put back what was there."""
    value = generator_for(seed, "dropout", number, part).initial_seed()
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed: where a GPU library is not in use yet, that writes down the whole stack.
        torch.default_generator.manual_seed(value)
        if on_gpu:
            torch.cuda.manual_seed(value)
        yield


def _attention(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[None]:
    """Avoid the fused attention of CPUs in bfloat16: its way back takes longer than all the rest."""
    slow = device.type == "cpu" and settings.precision == "bfloat16"
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def _shown(done: int, steps: int, loss: float, rate: float, numbers: Mapping[str, float]) -> str:
    others = "".join(f", {name} {value:.4g}" for name, value in numbers.items())
    # The loss first: narrow terminals cut off the end, and show the count beside it.
    return f"loss {loss:.4g}{others}, lr {rate:.3g}, step {done} of {steps}"
