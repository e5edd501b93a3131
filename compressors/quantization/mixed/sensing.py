"""The sensitivities of the bank's layers: what is measured, and where the table lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....calibration.inputs import check_table
from ....calibration.precision import widen
from ....calibration.sensitivity import Candidate, Table, Target, measure, read_measured
from ....calibration.sensitivity_calls import Calls
from ....models.base import OpenModel
from ....recipes.stages import GridSettings
from ....runtime.hashes import digest, file_sha256
from ...base import Workspace
from ..scheme import Survey, options_of, survey_linears
from .bank import Bank
from .candidates import AllocatingSettings, Candidates, activation_of, allocation_of
from .filling import Filling
from .folding import fold_all, read_transforms
from .offers import label_of_activation, nominal_bits
from .quantizer import BankQuantizer

# Sums depend on how they are split: only with one thread in every process do several processes give
# the values of one.
_THREADS = 1


@dataclass(frozen=True)
class Opener:
    """Opens the model in another process as the stage has it: in float32, behind its transforms.

    Attributes:
        reopen: opens it as the stage found it; picklable.
        settings: of the stage.
        transforms: file of the transforms; None without any.
    """

    reopen: Callable[[], OpenModel]
    settings: AllocatingSettings
    transforms: Path | None

    def __call__(self) -> OpenModel:
        """Open it."""
        model = self.reopen()
        widen(model.module, torch.float32)
        model.family.split(model.module)
        if self.transforms is not None:
            survey = survey_linears(model.family, model.module, self.settings, model.quantization)
            device = next(model.module.parameters()).device
            fold_all(model.module, survey.groups, read_transforms(self.transforms, device))
        return model


def targets_of(candidates: Candidates, survey: Survey, settings: AllocatingSettings) -> list[Target]:
    """Return what is measured: every choice of every layer but floating point, which loses nothing.

    A layer with a single choice is not measured.
    """
    targets = []
    for layer in candidates.layers:
        weights = sorted(layer.schemes, key=nominal_bits) if len(layer.costs) > 1 else []
        tried = [Candidate("weight", label, nominal_bits(label)) for label in weights]
        for bits in layer.activations if len(layer.activations) > 1 else ():
            scheme = activation_of(layer, survey, settings, bits)
            if scheme is not None:
                described = scheme.model_dump(mode="json")
                tried.append(Candidate("activation", label_of_activation(bits), bits, described))
        if tried:
            metric = candidates.metrics[layer.metric_group]
            names = tuple(single.site.name for single in layer.together)
            targets.append(Target(layer.site.name, tuple(tried), metric, names))
    return targets


def check_named_table(settings: AllocatingSettings) -> None:
    """Refuse a recipe that names a table which is not there, before anything is computed.

    Raises:
        SourceError: no such file, or a folder.
    """
    named = allocation_of(settings).sensitivity.table
    if named is not None:
        check_table(named)


def sense(filling: Filling, candidates: Candidates, bank: Bank, calls: Calls, workspace: Workspace) -> Table:
    """Measure the sensitivities, or go on with those that are there.

    They lie in `workspace.shared` by the hash of all they depend on, which the budget is no part of:
    another budget uses them again. `sensitivity.table` names a file instead, which is only read.

    Args:
        filling: of the model, which is behind its transforms by now.
        candidates: of its layers.
        bank: of the layers.
        calls: to measure on.
        workspace: of the stage.

    Raises:
        SourceError: the named table is absent, damaged, unfinished, or of something else.
        StageError: an output is not finite; the layer is named.
    """
    settings, transforms = filling.settings, filling.transforms_file
    named = allocation_of(settings).sensitivity.table
    targets = targets_of(candidates, filling.survey, settings)
    depends = _depends_on(settings, candidates, transforms, filling.calibration.key)
    if named is not None:
        return read_measured(filling.model, calls, targets, path=named, settings=depends, dtype=None)
    workers = workspace.workers if workspace.reopen is not None else 1
    cores = torch.get_num_threads()
    if workers < cores:
        filling.progress.note(f"sensitivities: {workers} of {cores} cores; --workers {cores} is faster")
    # Measured anew beside what others may be using, and put in its place when it is whole.
    kept = workspace.folder if workspace.fresh else workspace.shared
    table = measure(
        filling.model,
        calls,
        targets,
        BankQuantizer(bank),
        path=kept,
        settings=depends,
        dtype=None,
        workers=workers,
        threads=_THREADS,
        opener=None if workspace.reopen is None else Opener(workspace.reopen, settings, transforms),
        progress=filling.progress,
    )
    if kept != workspace.shared:
        for file in kept.glob("sensitivity-*.jsonl"):
            file.replace(workspace.shared / file.name)
    return table


def _depends_on(
    settings: AllocatingSettings, candidates: Candidates, transforms: Path | None, calibration_key: str
) -> dict[str, Any]:
    """Return what the bank's layers depend on beside the weights and their bits; JSON values.

    The schemes say what no setting says alone: whether a layer stores its output for the first token, and
    for which token, follows from the offered activations and the recorded prompts.
    """
    options = options_of(settings)
    grid = settings.model_dump(mode="json", include=set(GridSettings.model_fields) - {"keep"})
    schemes = {
        single.site.name: {
            label: scheme.model_dump(mode="json", exclude={"decided_by"})
            for label, scheme in single.schemes.items()
        }
        for layer in candidates.layers
        for single in layer.singles
    }
    return {
        "grid": grid,
        "rounding": calibration_key if options.compensate else "nearest",
        "low_rank": options.low_rank,
        "transforms": None if transforms is None else file_sha256(transforms),
        "schemes": digest(schemes),
    }
