"""How much a model's output suffers when one layer is quantized: a table for bit allocation.

One layer at a time (MixDQ, arXiv 2405.17873, section on sensitivity): for every layer and candidate the
recorded calls run through the model with this one layer computing as if quantized, and the output is
compared with the original's. Weights and activations are candidates of their own.

- Quality: the loss is the power of the error relative to the power of the output, 10^(-SQNR/10). Powers
  of independent errors add up, decibels do not. The paper uses the decibels: they stand in the table too.
- Content: the loss is 1 - SSIM, with the ordinary window of 11 pixels in floating point. The paper's code
  takes windows of 511 pixels on 8-bit images, which is little more than global statistics.

The model computes in float32. In 16 bits any change, however small, makes all later roundings fall
differently: the same error in every row, which hides what 8 bits do and would be counted once per layer
when losses are added up.

The outputs compared are the denoiser's in each recorded call, all channels; the paper's model has one
step, so there they are the samples. The model is never copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import SourceError
from ..models.base import OpenModel
from ..progress import Progress, step
from ..runtime.threads import computing_with
from .content import content_key, hash_weights
from .precision import computing_in
from .sensitivity_calls import Calls
from .sensitivity_probe import KEPT_LIMIT_BYTES, Candidate, Plan, Probe, Quantizer, Target
from .sensitivity_table import VERSION, Place, Row, Table, appending, whole_table
from .sensitivity_workers import Team, spread

__all__ = ["Candidate", "Quantizer", "Row", "Table", "Target", "measure", "read_measured"]

_JOBS_PER_WORKER = 4


def measure(
    model: OpenModel,
    calls: Calls,
    targets: Sequence[Target],
    quantizer: Quantizer,
    *,
    path: Path,
    settings: Mapping[str, Any],
    replace: bool = False,
    dtype: torch.dtype | None = torch.float32,
    workers: int = 1,
    threads: int | None = None,
    opener: Callable[[], OpenModel] | None = None,
    kept_limit_bytes: int = KEPT_LIMIT_BYTES,
    progress: Progress,
) -> Table:
    """Measure every candidate of every target and keep the rows in a file; go on where it stops.

    Args:
        model: to measure; unchanged afterwards.
        calls: to measure on.
        targets: layers and their candidates.
        quantizer: makes one layer compute as if quantized.
        path: of the table (JSON lines). A folder keeps tables by hash: `sensitivity-KEY.jsonl`.
        settings: what the quantizer depends on beside the candidates: JSON values.
        replace: begin anew where `path` is a table of something else; otherwise that is an error.
        dtype: to compute in, see `precision.computing_in`; None: as the model is.
        workers: processes; of no effect on the values. Above 1, `calls` and `quantizer` must be picklable.
        threads: of each process; None: those of this process divided by `workers`. Values are equal bit
            by bit where this is equal.
        opener: opens the same model in another process; picklable; needed for workers above 1.
        kept_limit_bytes: see `Probe`; for each process.
        progress: gets one step, in rows.

    Returns:
        The table, rows in the order of the targets and candidates (in the file: as they were measured).

    Raises:
        StageError: see `Probe` and `Probe.measure`; or a process died.
        SourceError: see `sensitivity_table.appending`.
        ValueError: an argument is out of range, or a candidate is there twice.
    """
    places = _places(targets)
    threads = _threads_of_each(workers, threads, opener)
    weights = hash_weights(model.module)
    key = _key(model, weights, calls.key, targets, [settings, str(dtype)])
    path = path / f"sensitivity-{key[:32]}.jsonl" if path.is_dir() else path
    about = {"calls": calls.key, "rows": len(places), "threads": threads}
    plan = Plan(calls, _layers(targets), quantizer, dtype, kept_limit_bytes)
    team = None if workers == 1 or opener is None else Team(opener, weights, workers, threads)
    with appending(path, key, about, replace=replace) as (table, append):
        done = _resumed(path, table, places, threads, progress)
        measured = _measured(model, plan, targets, dict(done), team)
        with step(progress, "sensitivities", len(places)), computing_with(threads), closing(measured):
            progress.advance(len(done))
            for row in measured if len(done) < len(places) else ():
                append(row)
                done[row.place] = row
                progress.advance(1, row.layer)
    return Table(table.key, table.about, tuple(done[place] for place in places))


def read_measured(
    model: OpenModel,
    calls: Calls,
    targets: Sequence[Target],
    *,
    path: Path,
    settings: Mapping[str, Any],
    dtype: torch.dtype | None = torch.float32,
) -> Table:
    """Return the table that `measure` would make, from a finished file; nothing is measured or written.

    Args:
        model, calls, targets, settings, dtype: as of `measure`.
        path: of the table.

    Raises:
        SourceError: see `sensitivity_table.whole_table`.
    """
    weights = hash_weights(model.module)
    key = _key(model, weights, calls.key, targets, [settings, str(dtype)])
    return whole_table(path, key, _places(targets))


def _measured(
    model: OpenModel,
    plan: Plan,
    targets: Sequence[Target],
    done: Mapping[Place, Row],
    team: Team | None,
) -> Generator[Row]:
    """Yield what is not done, measured here or by several processes.

    To be closed at once, however its use ends: until then the model is widened and processes run.
    """
    with computing_in(model.module, plan.dtype):
        probe = Probe(model, plan)
        if team is None:
            for job in probe.jobs(targets, done):
                yield from probe.measure(job)
            return
        jobs = probe.jobs(targets, done, _JOBS_PER_WORKER * team.workers)
        del probe  # and the calls and outputs that it holds
    yield from spread(jobs, plan, team)


def _key(
    model: OpenModel, weights: str, calls: str, targets: Sequence[Target], quantizer: Sequence[Any]
) -> str:
    """Return the hash of what the rows depend on, 64 hexadecimal digits.

    The weights count as they are in memory, whatever stages have done to them before.
    """
    listed = [
        {key: value for key, value in asdict(target).items() if key != "together" or value}
        for target in targets
    ]
    content = {"sensitivity": VERSION, "weights": weights, "calls": calls, "targets": listed}
    return content_key(model, {**content, "quantizer": list(quantizer)})


def _threads_of_each(workers: int, threads: int | None, opener: Callable[[], OpenModel] | None) -> int:
    if workers < 1 or (threads is not None and threads < 1):
        raise ValueError(f"workers {workers} and threads {threads} must be at least 1")
    if workers > 1 and opener is None:
        raise ValueError("several workers need an opener")
    return threads or max(1, torch.get_num_threads() // workers)


def _layers(targets: Sequence[Target]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer for target in targets for layer in target.layers))


def _places(targets: Sequence[Target]) -> list[Place]:
    places: list[Place] = [
        (item.kind, target.layer, item.label) for target in targets for item in target.candidates
    ]
    twice = next((place for place, count in Counter(places).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice[0]} {twice[2]} of {twice[1]} is asked for twice")
    return places


def _resumed(
    path: Path, table: Table, places: Sequence[Place], threads: int, progress: Progress
) -> dict[Place, Row]:
    """Return the rows that are there; tell where the new ones may differ in the last bits.

    Raises:
        SourceError: a row is none of those that are asked for.
    """
    done = {row.place: row for row in table.rows}
    unknown = done.keys() - set(places)
    if unknown:
        kind, layer, label = min(unknown)
        raise SourceError(
            f"{path}: {kind} {label} of {layer} is none of the candidates", hint="delete the table"
        )
    before = table.about.get("threads")
    if len(table.rows) < len(places) and before != threads:
        progress.note(
            f"{path}: begun with {before} threads a process, continued with {threads}:"
            " rows may differ in the last bits from those of one run"
        )
    return done
