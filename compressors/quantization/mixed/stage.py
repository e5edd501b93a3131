"""Bits per layer: transforms, a bank of rounded layers, sensitivities, a decision, and the layers it names.

The model computes in float32 throughout, and every weight is rounded once from it, into the bank. What
the sensitivities are measured with, what allocations are compared by and what is shipped are the same
quantized layers: integers, scales, transforms and biases, each in the type that it is stored in.

All other tensors are measured in float32 and narrowed to the model's own type at the end: layers left in
floating point, norms, embeddings. Most come back bit for bit; those that have absorbed input scales are
rounded, and the shipped model passes its own type from layer to layer. What both cost a 16-bit model is
part of no figure of this stage; the evaluation sees it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ....calibration.base import Calibration
from ....calibration.precision import computing_in
from ....calibration.recording import calls_of
from ....calibration.sensitivity import Table
from ....calibration.sensitivity_calls import Calls
from ....errors import StageError
from ....models.base import OpenModel, TensorSpec
from ....progress import Progress
from ....runtime.memory import return_freed_memory
from ...base import Workspace
from ..building import put
from ..details import averages, layer_row, scheme_bytes, unreached
from ..scheme import Choice, survey_linears
from .budgets import check_activation_budget
from .candidates import AllocatingSettings, Candidates, Settle, allocation_of, bytes_outside, find_candidates
from .decision import check_budget, decide
from .filling import Filling, likely_bits
from .folding import Transforms
from .labels import compact, stage_label
from .problem import Assignment
from .scoring import Installer, Scorer, input_elements
from .sensing import check_named_table, sense

_FEW_SAMPLES = 8


def apply_mixed(
    model: OpenModel,
    settings: AllocatingSettings,
    calibration: Calibration,
    workspace: Workspace,
    progress: Progress,
) -> dict[str, Any]:
    """Quantize a model in place, with bits per layer that keep a budget.

    Args:
        model: to change.
        settings: of the stage; they say how bits are chosen.
        calibration: recorded inputs. At most half of its samples are measured on; allocations are
            compared on others.
        workspace: the bank and the transforms lie in its folder, sensitivities where others find them.
        progress: to report to.

    Returns:
        layers (one row per linear), label, average bits, the allocation, and the sensitivities.

    Raises:
        PlanError: the budget cannot be kept, or see `candidates.find_candidates`.
        StageError: the calibration is too small or not finite, or nothing would change.
        SourceError: the sensitivities that the recipe names are those of something else.
    """
    with torch.no_grad():
        return MixedStage(model, settings, calibration, workspace, progress).run()


@dataclass(frozen=True)
class Prepared:
    """What an allocation is decided from.

    Attributes:
        candidates: layers with what may be chosen for them, settled on data.
        transforms: absorbed or kept.
        table: sensitivities.
        installer: turns an assignment into the rounded layers.
        seconds: what measuring the sensitivities took; 0 or nearly where they were there.
    """

    candidates: Candidates
    transforms: Transforms
    table: Table
    installer: Installer
    seconds: float


class MixedStage:
    """State of one run of the stage; the arguments are those of `apply_mixed`."""

    def __init__(
        self,
        model: OpenModel,
        settings: AllocatingSettings,
        calibration: Calibration,
        workspace: Workspace,
        progress: Progress,
    ) -> None:
        self.model, self.settings, self.allocation = model, settings, allocation_of(settings)
        self.calibration, self.workspace, self.progress = calibration, workspace, progress
        model.family.split(model.module)
        self.survey = survey_linears(model.family, model.module, settings, model.quantization)
        self.original_bytes = model.size().bytes
        self.planned = self._candidates()
        tensors = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in model.module.state_dict().items()
        }
        self.fixed_bytes = bytes_outside(tensors, model.shared, self.planned.names)

    def run(self) -> dict[str, Any]:
        """Do all of it."""
        layers = self.planned.layers
        check_named_table(self.settings)
        check_budget(layers, self.allocation, self.fixed_bytes, self.original_bytes)
        measured, compared = split_calls(self.calibration, self.settings)
        self._tell_samples()
        with computing_in(self.model.module, torch.float32):
            ready = self.prepare(measured, compared)
            candidates, installer = ready.candidates, ready.installer
            decision = decide(
                candidates.layers,
                ready.table,
                self.allocation,
                fixed_bytes=self.fixed_bytes,
                original_bytes=self.original_bytes,
                score=Scorer(self.model, compared, installer),
                progress=self.progress,
            )
            rows = self._install(candidates, installer, decision.assignment, ready.transforms)
        self._count_as_stored(decision.details)
        self.model.family.fuse(self.model.module)
        return_freed_memory()
        label = stage_label(candidates, decision.assignment)
        return {
            **averages(rows, label, self.model.shared),
            "allocation": decision.details,
            "sensitivity": compact(ready.table),
            **unreached(rows, self.progress),
            "layers": rows,
        }

    def prepare(self, measured: Calls, compared: Calls) -> Prepared:
        """Gather, decide on transforms, round all layers at all bits and measure their sensitivities.

        The model computes in float32 (`precision.computing_in`), and is left behind its transforms.

        Args:
            measured: calls to measure sensitivities on.
            compared: others, of which the first tells the sizes of inputs.
        """
        layers = self.planned.layers
        filling = Filling(
            self.model, self.survey, self.settings, self.calibration, self.workspace.folder, self.progress
        )
        filling.gather(layers)
        likely = likely_bits(layers, self.settings, self.fixed_bytes, self.original_bytes)
        transforms = filling.transforms(layers, likely)
        candidates = self._candidates(filling.settle, compared)
        check_activation_budget(candidates.layers, self.allocation)  # inputs are known by now
        bank = filling.bank(candidates.layers)
        began = time.perf_counter()
        table = sense(filling, candidates, bank, measured, self.workspace)
        seconds = time.perf_counter() - began
        return Prepared(candidates, transforms, table, Installer(filling, bank, candidates.layers), seconds)

    def _tell_samples(self) -> None:
        """Say so where fewer samples are measured on than was asked for, or compared on than is sound."""
        asked, have = self.allocation.sensitivity.samples, self.calibration.samples
        measured, compared = samples_of(asked, have)
        if measured < asked:
            self.progress.note(
                f"sensitivities are measured on {measured} of {have} calibration samples instead of {asked},"
                f" allocations compared on {compared}"
            )
        if compared < _FEW_SAMPLES:
            self.progress.note(
                f"allocations are compared on {compared} sample{'s' if compared > 1 else ''} only: chance"
                f" has a say; {2 * _FEW_SAMPLES} calibration.samples and sensitivity.samples: {_FEW_SAMPLES}"
                " are better"
            )

    def _candidates(self, settle: Settle | None = None, calls: Calls | None = None) -> Candidates:
        model = self.model
        names = [site.name for site in self.survey.sites]
        return find_candidates(
            model.family,
            self.survey,
            self.settings,
            model.spec.dtype,
            model.shared,
            settle=settle,
            inputs=None if calls is None else input_elements(model, calls, names),
        )

    def _install(
        self,
        candidates: Candidates,
        installer: Installer,
        assignment: Assignment,
        transforms: Transforms,
    ) -> list[dict[str, Any]]:
        """Put the chosen layers in the place of the originals; return one row per linear."""
        entries = {name: layer for layer in candidates.layers for name in layer.names}
        rows: list[dict[str, Any]] = []
        by_name: dict[str, dict[str, Any]] = {}
        for site in self.survey.sites:
            name, dtype = site.name, self.model.spec.dtype
            entry = entries.get(name)
            made = None if entry is None else installer.layer(entry, name, assignment)
            if entry is None or made is None:
                rule = candidates.float_rules[name] if entry is None else installer.rule(entry)
                rows.append(layer_row(Choice(site, None, rule), None, dtype))
                continue
            row = layer_row(
                Choice(site, made.layer.scheme, made.layer.scheme.decided_by), made.layer.scheme, dtype
            )
            row["act_exponent"] = transforms.exponent(name)
            rows.append({**row, **made.facts})
            by_name[name] = rows[-1]
            put(self.model.module, name, made.layer)
            self.model.quantization[name] = made.layer.scheme
        if not by_name:
            raise StageError(
                "every layer stays in floating point: the budget leaves room for that",
                hint="ask for a smaller budget, or take the stage out",
            )
        for name, ends in installer.fill_ranges().items():
            by_name[name]["activation_range"] = list(ends)
        return rows

    def _count_as_stored(self, details: dict[str, Any]) -> None:
        """Take off what was counted for a stored grid that an input in floating point does not need.

        Weights are decided first, with the grid counted for every layer; so a budget is kept anyway.
        """
        for row in details["layers"]:
            scheme = self.model.quantization.get(row["name"])
            if scheme is None or not row["bytes"]:
                continue
            saved = row["bytes"] - scheme_bytes(scheme, self.model.spec.dtype)
            row["bytes"] -= saved
            details["used"]["bytes"] -= saved
            details["used"]["allocated_bytes"] -= saved


def split_calls(calibration: Calibration, settings: AllocatingSettings) -> tuple[Calls, Calls]:
    """Return the calls that sensitivities are measured on, and others that allocations are compared on.

    The first samples of the calibration, at most half of them, and the next as many.

    Raises:
        StageError: the calibration has one sample only.
    """
    asked = allocation_of(settings).sensitivity
    have = calibration.samples
    if have < 2:
        raise StageError(
            f"the calibration has {have} sample; bits are measured on one half and compared on the other",
            hint="raise calibration.samples to 2 at least, better to twice sensitivity.samples",
        )
    count, others = samples_of(asked.samples, have)
    return (
        calls_of(calibration, steps=asked.steps, samples=count),
        calls_of(calibration, steps=asked.steps, samples=others, start=count),
    )


def samples_of(asked: int, have: int) -> tuple[int, int]:
    """Return how many samples are measured on, and on how many others allocations are compared."""
    count = min(asked, have // 2)
    return count, min(asked, have - count)
