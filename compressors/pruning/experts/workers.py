"""Where individuals are evaluated: in this process, in processes beside it, or on a Ray cluster.

All of them compute with the same number of threads, which follows from the lag of the search and from
the cores of this machine: sums over other numbers of threads differ in their last bits, and a search is
to find the same however many workers it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread

from ....calibration.processes import Announce, Worker
from ....recipes.workers import RaySettings, Workers
from .evolution import Submit, in_turn
from .genome import Individual
from .jobs import HINT, Evaluate, Evaluator, Job

_Asked = tuple[Future[float], Individual]


@contextmanager
def submitters(
    job: Job,
    workers: Workers,
    *,
    lag: int,
    here: Evaluate | None = None,
    device: str = "cpu",
    memory_bytes: int = 0,
) -> Iterator[Submit]:
    """Give what starts evaluations, for `evolve` and `choose`.

    However this ends - an error, Ctrl-C - no process is left, and no evaluation goes on.

    Args:
        job: what the workers open.
        workers: processes, or a Ray cluster. Of no effect on what is found. One process is this one.
            More than `lag` are not started: they would have nothing to do.
        lag: of the search.
        here: evaluates in this process; None: `job` is opened here as well, should that be needed.
        device: that `job` opens the model on; an actor takes a GPU, or as many CPUs as it has threads.
        memory_bytes: of a worker, which a cluster keeps free for it; 0: not known.

    Raises:
        UsageError: no actor can have this device.
        StageError: a worker died; what is finished is kept. By a future; or there is no cluster, or no
            place on it.
        CompressError: by a future: what the evaluation, or opening the model, raised.
        RuntimeError: by a future: the same of a defect, with the traceback of the process.
    """
    from ....runtime.threads import computing_with

    threads = threads_of_each(lag)
    with ExitStack() as stack:
        if isinstance(workers, RaySettings):
            from .ray_workers import Place, actors

            place = Place(device, threads, memory_bytes)
            evaluators = stack.enter_context(actors(job, workers, place, lag=lag))
        elif min(workers, lag) == 1:
            stack.enter_context(computing_with(threads))
            yield in_turn(here or job.open())
            return
        else:
            evaluators = stack.enter_context(_processes(job, min(workers, lag), threads))
        yield stack.enter_context(_asking(evaluators))


def threads_of_each(lag: int) -> int:
    """Return with how many threads an evaluation computes, in every worker alike."""
    import torch

    return max(1, torch.get_num_threads() // lag)


def idle_note(workers: Workers, lag: int) -> str | None:
    """Return what to tell the user of workers without work, or of cores without a worker; None: nothing."""
    import torch

    count = workers.workers if isinstance(workers, RaySettings) else workers
    if count is not None and count > lag:
        return (
            f"{count} workers, but only {lag} evaluation{'s go' if lag > 1 else ' goes'} on at once: the"
            f" others have nothing to do; lag: {count} uses them, and finds something else"
        )
    most = min(lag, torch.get_num_threads())
    if isinstance(workers, int) and workers < most:
        return f"{lag} evaluations can go on at once, in one process each: --workers {most} is faster"
    return None


@contextmanager
def _asking(evaluators: Sequence[Evaluator]) -> Iterator[Submit]:
    """Give what hands an individual to the first evaluator that is free; end them all afterwards."""
    waiting: SimpleQueue[_Asked | None] = SimpleQueue()

    def submit(individual: Individual) -> Future[float]:
        future: Future[float] = Future()
        waiting.put((future, individual))
        return future

    def started(evaluator: Evaluator) -> Thread:
        thread = Thread(target=_drive, args=(evaluator, waiting), daemon=True)
        thread.start()
        return thread

    with ExitStack() as last, ExitStack() as first:
        for evaluator in evaluators:
            last.callback(started(evaluator).join)
            first.callback(waiting.put, None)
            first.callback(evaluator.end)
        yield submit


def _drive(evaluator: Evaluator, waiting: SimpleQueue[tuple[Future[float], Individual] | None]) -> None:
    """Hand one individual after the other to an evaluator. One that failed once evaluates nothing more."""
    failure: Exception | None = None
    try:
        evaluator.ready()
    except Exception as error:
        failure = error
    while (asked := waiting.get()) is not None:
        future, individual = asked
        if not future.set_running_or_notify_cancel():
            continue
        try:
            if failure is not None:
                raise failure
            future.set_result(evaluator.ask(individual))
        except Exception as error:
            failure = error
            future.set_exception(error)


@contextmanager
def _processes(job: Job, count: int, threads: int) -> Iterator[list[Evaluator]]:
    """Start processes of this machine, and end them."""
    found: list[Evaluator] = []
    with ExitStack() as stack:
        for _ in range(count):
            process = _Process(job, threads)
            stack.callback(process.close)
            stack.callback(process.end)
            found.append(process)
        yield found


@dataclass(frozen=True)
class _Evaluating:
    """What a process does."""

    job: Job
    threads: int
    hint: str = HINT

    @property
    def does(self) -> str:
        return f"measures {self.job.name}"

    @contextmanager
    def opened(self, announce: Announce) -> Iterator[Callable[[Individual], tuple[float]]]:
        from ....runtime.threads import computing_with

        with computing_with(self.threads):
            evaluate = self.job.open()
            yield lambda individual: (float(evaluate(individual)),)


class _Process:
    """An evaluator in a process of its own."""

    def __init__(self, job: Job, threads: int) -> None:
        self._worker = Worker(_Evaluating(job, threads), "before the model was open")
        self.end, self.close = self._worker.end, self._worker.close

    def ready(self) -> None:
        while self._worker.receive()[0] != "ready":
            continue

    def ask(self, individual: Individual) -> float:
        self._worker.at = f"at individual {individual.sha256[:12]}"
        self._worker.give(individual)
        found: float | None = None
        while True:
            kind, content = self._worker.receive()
            if kind == "result":
                found = content
            elif kind == "done" and found is not None:
                return found
