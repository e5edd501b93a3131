"""Sensitivities over several processes: each opens the model itself, the parent collects the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait

import torch

from ..errors import StageError
from ..models.base import OpenModel
from .content import hash_weights
from .precision import computing_in
from .processes import Announce, Worker
from .sensitivity_probe import Candidate, Job, Plan, Probe
from .sensitivity_table import Row


@dataclass(frozen=True)
class Team:
    """Processes that measure.

    Attributes:
        opener: opens the model in each; picklable.
        weights: hash of the weights that it must have.
        workers: how many.
        threads: of each.
    """

    opener: Callable[[], OpenModel]
    weights: str
    workers: int
    threads: int


@dataclass(frozen=True)
class _Measuring:
    """What each of them does."""

    team: Team
    plan: Plan
    does: str = "measures sensitivities"
    hint: str = "the finished rows are kept: run again; take fewer workers if memory ran out"

    @contextmanager
    def opened(self, announce: Announce) -> Iterator[Callable[[Job], Iterator[Row]]]:
        torch.set_num_threads(self.team.threads)
        model = self.team.opener()
        if hash_weights(model.module) != self.team.weights:
            raise StageError(
                "the model opened for a worker is not the one to be measured: its weights differ",
                hint="measure in one process",
            )

        def announce_candidate(layer: str, candidate: Candidate) -> None:
            announce(f"{layer}, {candidate.kind} {candidate.label}")

        with computing_in(model.module, self.plan.dtype):
            probe = Probe(model, self.plan)
            yield lambda job: probe.measure(job, announce_candidate)


def spread(jobs: Sequence[Job], plan: Plan, team: Team) -> Iterator[Row]:
    """Yield the rows of all jobs as the processes deliver them.

    However this ends - an error, Ctrl-C, a caller that stops listening - no process is left.

    Args:
        jobs: the longest first.
        plan: what a process makes its `Probe` of.
        team: the processes.

    Raises:
        StageError: a process died, named with the layer it was at; the opener opens something else; or
            what `Probe` raises.
        RuntimeError: a defect, with the traceback of the process.
    """
    waiting = list(jobs)
    workers: list[Worker[Job, Row]] = []
    try:
        for _ in range(min(team.workers, len(waiting))):
            workers.append(Worker(_Measuring(team, plan), "before the first layer"))
            workers[-1].give(waiting.pop(0))
        busy = list(workers)
        while busy:
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                kind, content = worker.receive()
                if kind == "result":
                    yield content
                elif kind == "done" and waiting:
                    worker.give(waiting.pop(0))
                elif kind == "done":
                    busy.remove(worker)
    finally:
        for worker in workers:
            worker.end()
            worker.close()
