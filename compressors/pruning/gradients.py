"""Gradients over calibration samples: the sum over all of them, for the tensors that are scored.

The sum runs in float32 whatever the weights are in, part by part, and each gradient is added as soon as
the backward pass has it: beside the model and its activations stands one float32 copy of the named tensors.
The absolute value is taken of the sum, not of its terms (arXiv 2407.04616 and its official code), so how
the samples are cut into parts changes rounding alone. With `absolute` it is |weight * gradient| of every
part that is summed instead.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from ...calibration.flags import keeping_flags
from ...calibration.objectives import Objective
from ...calibration.precision import computing_in
from ...errors import StageError
from ...models.base import OpenModel
from ...progress import Progress, step
from .gradients_file import Partial, key_of, read, write

_SAVED_AT_MOST = 1 / 20
"""Share of the time that may go into writing what has been summed so far."""
_ZERO_HINT = "take a loss that is not at its least on these samples (`loss`), or importance: magnitude"


@dataclass(frozen=True)
class Gradients:
    """What `accumulate` gives.

    Attributes:
        sums: tensor name -> gradient of the summed loss, or what `absolute` sums; float32, on the tensor's
            device.
        loss: mean over all samples.
        samples: how many there were.
    """

    sums: Mapping[str, Tensor]
    loss: float
    samples: int

    def of(self, name: str) -> Tensor:
        """Return the summed gradient of a tensor, of its shape, float32.

        Raises:
            KeyError: it was not asked for.
        """
        return self.sums[name]


def accumulate(
    model: OpenModel,
    objective: Objective,
    tensors: Collection[str],
    *,
    folder: Path | None,
    progress: Progress,
    save_every_seconds: float = 60.0,
    absolute: bool = False,
    zero_hint: str = _ZERO_HINT,
) -> Gradients:
    """Sum the gradients of a loss over all its samples.

    Afterwards the model is as it was: flags, modes and weights, also after an error or an interruption, and
    no parameter has a gradient. Weights in float16 are computed with in float32, since gradients leave the
    range of float16.

    Args:
        model: with its weights; evaluated, not trained.
        objective: gives the loss part by part.
        tensors: names of parameters.
        folder: where the sum so far is kept, so that a killed run goes on with it, to equal bytes; None:
            nowhere. One file, of the latest weights and samples.
        progress: sees a unit for each part, with the mean loss so far.
        save_every_seconds: time between two writings; more where writing is slow.
        absolute: sum |weight * gradient| of every part, not gradients.
        zero_hint: what to do where the gradients of all tensors are zero.

    Raises:
        StageError: a name is no parameter, there are no samples, a loss or a gradient is not finite, or the
            gradients of all tensors are zero.
    """
    names = sorted(tensors)
    parameters = _parameters(model.module, names)
    key = key_of(model.module, f"{objective.key} absolute" if absolute else objective.key, names)
    started = None if folder is None else read(folder, key, parameters)
    with ExitStack() as stack:
        stack.enter_context(computing_in(model.module, _computed_in(model.module)))
        stack.enter_context(_only(model.module, parameters))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        sums = _summed_into(parameters, stack, started, absolute=absolute)
        total = _run(model, objective, sums, started, key, folder, progress, save_every_seconds)
    if not any(bool(value.any()) for value in sums.values()):
        raise StageError(
            "the gradients of all weights are zero, so nothing tells which are worth keeping",
            hint=zero_hint,
        )
    return Gradients(sums, total.loss_sum / total.samples, total.samples)


def _parameters(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    known = dict(module.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise StageError(f"no parameter to take a gradient of: {', '.join(unknown) or 'none was named'}")
    return {name: known[name] for name in names}


def _run(
    model: OpenModel,
    objective: Objective,
    sums: Mapping[str, Tensor],
    started: Partial | None,
    key: str,
    folder: Path | None,
    progress: Progress,
    save_every_seconds: float,
) -> Partial:
    """Go through the parts that are left, and return how far that came, without the tensors."""
    now = started or Partial(0, 0, 0.0, {})
    parts, samples, loss_sum = now.parts, now.samples, now.loss_sum
    saved, interval = time.monotonic(), save_every_seconds
    with step(progress, "gradients", objective.parts):
        if parts:
            progress.advance(parts, f"{parts} parts of a run that was broken off")
        for loss, count in objective.losses(model, parts) if parts < objective.parts else ():
            loss_sum += _backward(loss, sums, parts, objective.parts)
            parts, samples = parts + 1, samples + count
            progress.advance(1, f"loss {loss_sum / samples:.4g}")
            if folder is not None and (time.monotonic() - saved >= interval or parts == objective.parts):
                before = time.monotonic()
                write(folder, key, Partial(parts, samples, loss_sum, sums))
                saved = time.monotonic()
                interval = max(save_every_seconds, (saved - before) / _SAVED_AT_MOST)
    if samples == 0:
        raise StageError("there are no calibration samples to take gradients on")
    return Partial(parts, samples, loss_sum, {})


def _backward(loss: Tensor, sums: Mapping[str, Tensor], part: int, parts: int) -> float:
    """Add the gradients of a part, and return its loss."""
    value = float(loss.detach())
    place = f"part {part + 1} of {parts} of the calibration samples"
    if not isfinite(value):
        raise StageError(
            f"the loss of {place} is {value}",
            hint="look at these samples and at the weights; in half precision try model.dtype: float32",
        )
    loss.backward()  # hooks add the gradients
    finite = torch.stack([torch.isfinite(total.sum()).cpu() for total in sums.values()])
    if not bool(finite.all()):
        bad = [name for name, good in zip(sums, finite.tolist(), strict=True) if not good]
        raise StageError(
            f"the gradient of {place} is not finite for {bad[0]}"
            + (f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""),
            hint="look at these samples; in half precision try model.dtype: float32",
        )
    return value


def _summed_into(
    parameters: Mapping[str, nn.Parameter], stack: ExitStack, started: Partial | None, *, absolute: bool
) -> dict[str, Tensor]:
    """Let every gradient be added to a float32 tensor, and dropped, when a backward pass has it."""
    adding = _adding_worth_to if absolute else _adding_to
    sums: dict[str, Tensor] = {}
    shared: dict[nn.Parameter, Tensor] = {}  # a tensor of two names is summed once
    for name, parameter in parameters.items():
        if parameter not in shared:
            total = torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)
            total.requires_grad_(False)
            if started is not None:
                total.copy_(started.sums[name])
            shared[parameter] = total
            stack.callback(parameter.register_post_accumulate_grad_hook(adding(total)).remove)
        sums[name] = shared[parameter]
    return sums


class _adding_to:  # noqa: N801 (used as a function)
    """A hook that moves a parameter's gradient into a sum."""

    def __init__(self, total: Tensor) -> None:
        self._total = total

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            self._total.add_(parameter.grad)
        parameter.grad = None


class _adding_worth_to(_adding_to):  # noqa: N801 (used as a function)
    """A hook that adds |parameter * gradient| to a sum, and drops the gradient."""

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        with torch.no_grad():
            self._total.add_(parameter.grad.float().mul_(parameter).abs_())
        parameter.grad = None


@contextmanager
def _only(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluate, with gradients for these parameters alone; then put all flags back."""
    wanted = set(parameters.values())
    with keeping_flags(module):
        try:
            module.eval()
            for parameter in module.parameters():
                parameter.grad = None
                parameter.requires_grad_(parameter in wanted)
            yield
        finally:
            for parameter in module.parameters():
                parameter.grad = None


def _computed_in(module: nn.Module) -> torch.dtype | None:
    """Return float32 where weights are float16, in which gradients overflow; None: as they are stored."""
    halves = any(parameter.dtype == torch.float16 for parameter in module.parameters())
    return torch.float32 if halves else None
