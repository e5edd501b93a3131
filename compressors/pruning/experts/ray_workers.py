"""Evaluations by actors of a Ray cluster: one for every device, each opens the model itself.

The model and the package have to be on every node, in the same place and the same version. Nothing is told
to anybody but the cluster: usage statistics and the dashboard of a cluster that is started here are off.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from ....calibration.processes import sent_error
from ....errors import StageError, UsageError
from ....recipes.workers import RaySettings
from ....version import __version__
from .genome import Individual
from .jobs import HINT, Evaluate, Evaluator, Job

_PLACED_SECONDS = 300.0
"""How long a cluster may take to find a place for the first actor."""
_STORE_BYTES = 100 * 2**20  # of a cluster that is started here: what is passed are coefficients
# Skipped are messages about actors that died, which it prints to stdout; they are errors of ours anyway. It
# reads this when it is imported.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
_OF_RAY = ("RAY_", "PYTHONBREAKPOINT")
_PACKAGES = ("numpy", "torch", "transformers")


@dataclass(frozen=True)
class Place:
    """What an actor needs.

    Attributes:
        device: that the job opens its model on: cpu, cuda or cuda:0.
        threads: that it computes with.
        memory_bytes: of a process on CPUs; 0: not known.
    """

    device: str
    threads: int
    memory_bytes: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether an actor takes a GPU."""
        return self.device.startswith("cuda")

    def needs(self, most_cpus: float) -> dict[str, Any]:
        """Return the options of an actor, on nodes with at most so many CPUs."""
        if self.on_gpu:
            return {"num_gpus": 1, "num_cpus": min(1, most_cpus)}
        memory = {"memory": self.memory_bytes} if self.memory_bytes else {}
        return {"num_gpus": 0, "num_cpus": max(1, min(self.threads, int(most_cpus))), **memory}

    def check(self) -> None:
        """Refuse a device that no actor can have.

        Raises:
            UsageError: naming it.
        """
        if self.on_gpu and self.device not in ("cuda", "cuda:0"):
            raise UsageError(
                f"device: {self.device}: an actor of a Ray cluster sees one GPU, its own, which is cuda:0",
                hint="write device: cuda; CUDA_VISIBLE_DEVICES says which GPU this process takes",
            )


@contextmanager
def actors(job: Job, settings: RaySettings, place: Place, *, lag: int) -> Iterator[list[Evaluator]]:
    """Start actors on a cluster, and end them; and the cluster, if it was started here.

    Args:
        job: what each opens.
        settings: how many.
        place: what each needs.
        lag: of the search: more would have nothing to do.

    Raises:
        UsageError: there is no such device.
        StageError: the cluster cannot be reached, or no actor can be placed.
    """
    place.check()
    wanted = lag if settings.workers is None else min(lag, settings.workers)
    asked = 0 if settings.workers is None else wanted * place.threads
    with _cluster(asked), ExitStack() as stack:
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = place.needs(max(resources.get("CPU", 0) for resources in nodes))
        count = min(wanted, sum(_room(resources, needs) for resources in nodes))
        if count == 0:
            raise _no_room(place, needs)
        found: list[Evaluator] = []
        for _ in range(count):
            handle = ray.remote(_Actor).options(**needs).remote()
            stack.callback(ray.kill, handle)
            found.append(_Distant(handle, job, place.threads))
        _await_first([one.handle for one in found if isinstance(one, _Distant)])
        yield found


def _room(resources: Mapping[str, float], needs: Mapping[str, Any]) -> int:
    """Return how many actors a node has room for."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    return min(int(resources.get(names[key], 0) // value) for key, value in needs.items() if value)


def _no_room(place: Place, needs: Mapping[str, Any]) -> StageError:
    what = "a GPU" if place.on_gpu else f"{needs['num_cpus']} CPUs"
    memory = f" and {place.memory_bytes:,} bytes of memory" if "memory" in needs else ""
    return StageError(
        f"no node of the Ray cluster has {what}{memory}, which an evaluation on {place.device} needs",
        hint="add a node, or write a number of processes as --workers",
    )


def _await_first(handles: list[Any]) -> None:
    """Wait until an actor runs: others may be using the cluster.

    Raises:
        StageError: none does.
    """
    import ray

    placed, _ = ray.wait([handle.placed.remote() for handle in handles], timeout=_PLACED_SECONDS)
    if not placed:
        raise StageError(
            f"the Ray cluster had no place for an actor in {_PLACED_SECONDS:.0f} seconds",
            hint="others are using it: `ray status` shows who; run again later, nothing is lost",
        )


@contextmanager
def _cluster(cpus: int) -> Iterator[None]:
    """Be connected to a cluster; one that this process is connected to already is left alone.

    Args:
        cpus: that a cluster has at the least which is started here.

    Raises:
        StageError: it cannot be reached.
    """
    with _surroundings_kept():
        import ray

        if ray.is_initialized():
            yield
            return
        try:
            _connect(max(cpus, len(os.sched_getaffinity(0))))
        except (ConnectionError, TimeoutError, RuntimeError, ImportError) as error:
            where = os.environ.get("RAY_ADDRESS") or "of this machine"
            raise StageError(
                f"the Ray cluster {where} cannot be reached: {error}",
                hint="RAY_ADDRESS says which one is meant, RAY_AUTH_MODE=token that it wants Ray's token; "
                "`ray stop` ends what is left of one that is gone",
            ) from None
        try:
            yield
        finally:
            ray.shutdown()


def _connect(cpus: int) -> None:
    import ray

    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    started = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if os.environ.get("RAY_ADDRESS", "local") != "local":
            ray.init(**quiet)
            return
        try:
            ray.init(**quiet, **started)
        except ValueError:  # what is started cannot be chosen where a cluster is there
            ray.init(**quiet)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # a termination ends the run as it does without Ray


@contextmanager
def _surroundings_kept() -> Iterator[None]:
    """Undo what Ray writes into the environment; let it tell nobody that it is used, and print nothing."""
    before = dict(os.environ)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith(_OF_RAY)]:
            if name not in before:
                del os.environ[name]


class _Distant:
    """An evaluator on the cluster, as this process sees it."""

    def __init__(self, handle: Any, job: Job, threads: int) -> None:
        self.handle = handle
        self._job, self._threads = job, threads

    def ready(self) -> None:
        self._get("before the model was open", self.handle.open.remote(self._job, self._threads, _versions()))

    def ask(self, individual: Individual) -> float:
        return float(
            self._get(f"at individual {individual.sha256[:12]}", self.handle.measure.remote(individual))
        )

    def end(self) -> None:
        import ray

        ray.kill(self.handle)

    def _get(self, at: str, reference: Any) -> Any:
        """Wait for an answer; raise the error that it may be."""
        import ray

        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            told = next(iter(str(error).strip(" '").splitlines()), type(error).__name__)
            raise StageError(
                f"a Ray actor that measures {self._job.name} died, {at}: {told}",
                hint=f"{HINT}; the package and the model have to be on every node",
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Actor:
    """An evaluator, on its node. Errors are answers: Ray would wrap them."""

    def __init__(self) -> None:
        self._evaluate: Evaluate | None = None
        self._name = ""

    def placed(self) -> bool:
        """Answer as soon as it runs."""
        return True

    def open(self, job: Job, threads: int, versions: dict[str, str]) -> Exception | None:
        """Open the model; the result is what went wrong."""
        import torch

        self._name = job.name
        try:
            _check_versions(versions)
            torch.set_num_threads(threads)
            self._evaluate = job.open()
        except Exception as error:
            return sent_error(error, f"a Ray actor that measures {job.name}")
        return None

    def measure(self, individual: Individual) -> float | Exception:
        """Return the fitness, or what went wrong."""
        try:
            if self._evaluate is None:
                raise RuntimeError("the model is not open")
            return float(self._evaluate(individual))
        except Exception as error:
            return sent_error(error, f"a Ray actor that measures {self._name}")


def _versions() -> dict[str, str]:
    """Return the versions that decide a fitness."""
    return {"compress": __version__, **{package: metadata.version(package) for package in _PACKAGES}}


def _check_versions(expected: Mapping[str, str]) -> None:
    here = _versions()
    for package, version in expected.items():
        if here[package] != version:
            raise StageError(
                f"a node of the Ray cluster has {package} {here[package]}, this machine {version}:"
                " they would measure different values",
                hint="install the same versions on every node",
            )
