"""How far the model's output is off under an assignment: installed from the bank, measured, taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ....calibration.sampler import place
from ....calibration.sensitivity_calls import Calls
from ....calibration.similarity import powers
from ....errors import StageError
from ....models.base import OpenModel
from ....recipes.allocation import ALLOCATED
from ....runtime.linear import QuantizedLinear
from ....runtime.moe_names import expert_linear
from ..building import put
from ..ranges import calibrate_ranges
from .bank import Bank
from .candidates import LayerChoices, activation_of, allocation_of
from .filling import Filling
from .offers import FLOAT_LABEL
from .problem import Assignment


class Made(NamedTuple):
    """A layer of the bank, and what is told about it."""

    layer: QuantizedLinear
    facts: Mapping[str, Any]


class Installer:
    """Turns an assignment into layers.

    Args:
        filling: of the model, which is in floating point behind its transforms.
        bank: of its layers.
        choices: what was to choose.
    """

    def __init__(self, filling: Filling, bank: Bank, choices: Sequence[LayerChoices]) -> None:
        self._filling, self.bank, self._choices = filling, bank, choices
        self._model, self._settings = filling.model, filling.settings

    def layer(self, entry: LayerChoices, name: str, assignment: Assignment) -> Made | None:
        """Return what `name` becomes; None where it stays in floating point."""
        label = assignment.weights[name]
        if label == FLOAT_LABEL:
            return None
        activation = activation_of(entry, self._filling.survey, self._settings, assignment.activations[name])
        changes = {"activation": activation, "decided_by": self.rule(entry)}
        original = self._model.module.get_submodule(name)
        found = self.bank.read(entry.stored(name).site.name, label)
        return Made(self.bank.made(found, original, changes), found.facts)

    def rule(self, entry: LayerChoices) -> str:
        """Return what decided a layer's bits."""
        if len(entry.costs) == 1:
            return entry.decided_by
        limits = allocation_of(self._settings).budget.model_dump(exclude_none=True)
        return ALLOCATED + ", ".join(f"{name} {value:.12g}" for name, value in limits.items())

    @contextmanager
    def installed(self, assignment: Assignment) -> Iterator[None]:
        """Let the model compute with an assignment for a while."""
        module = self._model.module
        replaced = []
        try:
            for entry in self._choices:
                for name in entry.names:
                    made = self.layer(entry, name, assignment)
                    if made is not None:
                        replaced.append((name, module.get_submodule(name)))
                        put(module, name, made.layer)
            self.fill_ranges()
            yield
        finally:
            for name, original in replaced:
                put(module, name, original)

    def fill_ranges(self) -> dict[str, tuple[float, float]]:
        """Find the static grids of the layers that are installed; see `ranges.calibrate_ranges`."""
        average = self._settings.activation_range or "minmax"
        return calibrate_ranges(self._model, self._filling.calibration, average, self._filling.progress)


class Scorer:
    """Measures assignments on calls; holds them and the original's outputs in memory.

    Args:
        model: in floating point; its answers are what others are compared with.
        calls: to measure on.
        installer: of assignments.

    Raises:
        StageError: the original's output is not finite or zero.
    """

    def __init__(self, model: OpenModel, calls: Calls, installer: Installer) -> None:
        self._model, self._installer = model, installer
        self._calls = [place(call, model.module) for call in calls]
        self._references = [self._run(call) for call in self._calls]
        finite = all(bool(torch.isfinite(output).all()) for output in self._references)
        if not finite or not any(bool(output.any()) for output in self._references):
            raise StageError(
                "the original model's output is not finite, or zero, in the calls that allocations are"
                " compared on",
                hint="check the calibration",
            )

    def __call__(self, assignment: Assignment) -> float:
        """Return the power of the error relative to that of the output, 10^(-SQNR/10).

        Raises:
            StageError: the output is not finite.
        """
        signal = noise = 0.0
        with self._installer.installed(assignment):
            for call, reference in zip(self._calls, self._references, strict=True):
                output = self._run(call)
                if not bool(torch.isfinite(output).all()):
                    raise StageError(
                        "the model's output is not finite under an allocation that was tried",
                        hint="offer more bits, or keep sensitive layers in floating point",
                    )
                added = powers(reference, output)
                signal, noise = signal + added[0], noise + added[1]
        return noise / signal

    @torch.no_grad()
    def _run(self, call: dict[str, Any]) -> Tensor:
        output: Tensor = self._model.module(**call, return_dict=False)[0]
        return output


@torch.no_grad()
def input_elements(model: OpenModel, calls: Calls, names: Sequence[str]) -> dict[str, int]:
    """Return how many elements the input of each layer has in one forward of one sample.

    Args:
        model: to run once.
        calls: the first one is run.
        names: of the layers. Of experts each is told the mean of its mixture: which tokens meet which one
            differs from call to call, and the mean does not.
    """
    found: dict[str, int] = {}
    call = place(next(iter(calls)), model.module)
    batch = max(
        (len(value) for value in call.values() if isinstance(value, Tensor) and value.ndim), default=1
    )
    with ExitStack() as stack:
        for name in names:

            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                x: Tensor = args[0] if args else next(iter(kwargs.values()))
                found[name] = found.get(name, 0) + x.numel() // batch

            layer = model.module.get_submodule(name)
            stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
        model.module(**call, return_dict=False)
    return _averaged(found, names)


def _averaged(found: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Return the elements of every layer's input, of experts the mean of their mixture, rounded up."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name in names:
        expert = expert_linear(name)
        if expert is not None:
            alike.setdefault((expert[0], expert[2]), []).append(name)
    averaged = dict(found)
    for group in alike.values():
        mean = -(-sum(found.get(name, 0) for name in group) // len(group))
        averaged |= dict.fromkeys(group, mean)
    return averaged
