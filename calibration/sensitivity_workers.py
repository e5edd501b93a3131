"""Sensitivities over several processes: each opens the model itself, the parent collects the rows."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from ..errors import CompressError, StageError
from ..models.base import OpenModel
from .content import hash_weights
from .precision import computing_in
from .sensitivity_probe import Candidate, Job, Plan, Probe
from .sensitivity_table import Row

_GRACE_SECONDS = 5.0


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
    workers: list[_Worker] = []
    try:
        for _ in range(min(team.workers, len(waiting))):
            workers.append(_Worker(team, plan))
            workers[-1].give(waiting)
        while any(worker.busy for worker in workers):
            ready = wait([worker.pipe for worker in workers if worker.busy])
            for worker in workers:
                if worker.pipe in ready:
                    yield from worker.listen(waiting)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process and what the parent knows about it."""

    def __init__(self, team: Team, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.busy, self.at = False, "before the first layer"
        self.process = context.Process(target=_work, args=(other, team, plan), daemon=True)
        # Ctrl-C reaches every process of the terminal. The mask is inherited: only the parent hears it,
        # also while the others are still starting, and ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        other.close()  # the process holds the only one, so that its death can be heard

    def give(self, waiting: list[Job]) -> None:
        """Hand over the next job, if there is one."""
        self.busy = bool(waiting)
        if waiting:
            try:
                self.pipe.send(waiting.pop(0))
            except BrokenPipeError:
                raise self._died() from None

    def listen(self, waiting: list[Job]) -> Iterator[Row]:
        """Take one message; yield the row that it may be."""
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "at":
            self.at = f"at {content}"
        elif kind == "row":
            yield content
        elif kind == "error":
            raise content
        else:
            self.give(waiting)

    def _died(self) -> StageError:
        self.process.join(_GRACE_SECONDS)
        code = self.process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return StageError(
            f"a process that measures sensitivities {how}, {self.at}",
            hint="the finished rows are kept: run again; take fewer workers if memory ran out",
        )

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.pipe.close()
        self.process.terminate()
        self.process.join(_GRACE_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(pipe: Connection, team: Team, plan: Plan) -> None:
    """Measure job after job until the parent closes the pipe."""
    torch.set_num_threads(team.threads)
    try:
        _serve(pipe, team, plan)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone
    except Exception as error:
        known = isinstance(error, CompressError)
        text = f"a process that measures sensitivities failed:\n{traceback.format_exc()}"
        _send_last(pipe, error if known else RuntimeError(text))


def _send_last(pipe: Connection, error: Exception) -> None:
    try:
        pipe.send(("error", error))
    except (BrokenPipeError, ConnectionResetError):
        return  # nobody is left to tell


def _serve(pipe: Connection, team: Team, plan: Plan) -> None:
    model = team.opener()
    if hash_weights(model.module) != team.weights:
        raise StageError(
            "the model opened for a worker is not the one to be measured: its weights differ",
            hint="measure in one process",
        )

    def announce(layer: str, candidate: Candidate) -> None:
        pipe.send(("at", f"{layer}, {candidate.kind} {candidate.label}"))

    with computing_in(model.module, plan.dtype):
        probe = Probe(model, plan)
        while True:
            job: Job = pipe.recv()
            for row in probe.measure(job, announce):
                pipe.send(("row", row))
            pipe.send(("done", None))
