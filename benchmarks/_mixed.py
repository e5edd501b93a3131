"""A model made ready for allocations: its layers rounded at all bits, its sensitivities, and scorers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from compress.calibration.diffusion import record
from compress.calibration.precision import computing_in
from compress.calibration.recording import calls_of
from compress.calibration.sensitivity import Table
from compress.compressors.base import Workspace
from compress.compressors.quantization.mixed.activations import in_floating_point
from compress.compressors.quantization.mixed.bank import Bank
from compress.compressors.quantization.mixed.candidates import AllocatingSettings, LayerChoices
from compress.compressors.quantization.mixed.problem import Assignment, spread
from compress.compressors.quantization.mixed.scoring import Scorer
from compress.compressors.quantization.mixed.stage import MixedStage, split_calls
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef
from torch import nn

_OTHER_SEED = 1000  # of the trajectories that nothing was decided on


@dataclass(frozen=True)
class Prepared:
    """What allocations are made from, and measured by.

    Attributes:
        layers: with their choices.
        table: sensitivities.
        fixed_bytes: of all tensors that are not allocated.
        original_bytes: of all tensors before.
        weight_errors: layer -> label -> |W - W^|^2 / |W|^2.
        unseen: measures an assignment on trajectories that nothing was decided on.
        seconds: what the sensitivities took; 0 where they were there.
    """

    layers: tuple[LayerChoices, ...]
    table: Table
    fixed_bytes: int
    original_bytes: int
    weight_errors: Mapping[str, Mapping[str, float]]
    unseen: Scorer
    seconds: float

    def error(self, chosen: Mapping[str, str]) -> float:
        """Return the relative error power on unseen trajectories, weights quantized alone."""
        weights = spread(self.layers, chosen)
        return self.unseen(Assignment(weights, in_floating_point(self.layers)))


@contextmanager
def prepared(
    model_id: str,
    settings: AllocatingSettings,
    calibration: CalibrationSettings,
    folder: Path,
    seed: int,
    unseen: tuple[int, int],
) -> Iterator[Prepared]:
    """Round and measure a model; it computes in float32 until the context ends.

    Args:
        model_id: of an original.
        settings: of the stage.
        calibration: to round and measure on.
        folder: for recordings and rounded layers.
        seed: of everything.
        unseen: samples and steps of the trajectories to compare on.
    """
    silent = SilentProgress()
    model = open_model(ModelRef(id=model_id), progress=silent)
    recorded = record(model, calibration, seed=seed, cache=folder / "calibration", progress=silent)
    fresh = calibration.model_copy(update={"samples": unseen[0]})
    other = record(model, fresh, seed=seed + _OTHER_SEED, cache=folder / "calibration", progress=silent)
    workspace = Workspace(folder / "stage", folder / "measured")
    workspace.shared.mkdir(exist_ok=True)
    stage = MixedStage(model, settings, recorded, workspace, silent)
    with torch.no_grad(), computing_in(model.module, torch.float32):
        ready = stage.prepare(*split_calls(recorded, settings))
        layers = ready.candidates.layers
        calls = calls_of(other, steps=unseen[1], samples=unseen[0])
        yield Prepared(
            layers,
            ready.table,
            stage.fixed_bytes,
            stage.original_bytes,
            _weight_errors(model.module, layers, ready.installer.bank),
            Scorer(model, calls, ready.installer),
            ready.seconds,
        )


def _weight_errors(
    module: nn.Module, layers: Sequence[LayerChoices], bank: Bank
) -> dict[str, dict[str, float]]:
    """Return |W - W^|^2 / |W|^2 of every layer at all its bits, transforms undone."""
    errors: dict[str, dict[str, float]] = {}
    for entry in layers:
        name = entry.site.name
        original = module.get_submodule(name)
        weight = original.weight.detach().flatten(1)
        power = weight.square().sum()
        made = {label: bank.layer(name, label, original).equivalent_weight() for label in entry.schemes}
        errors[name] = {
            label: float((rounded - weight).square().sum() / power) for label, rounded in made.items()
        }
    return errors
