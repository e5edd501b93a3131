"""A search over a landscape with a planted optimum, and a program that runs one in a process of its own."""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from compress.compressors.pruning.experts.archive import Archive
from compress.compressors.pruning.experts.evolution import Search, evolve, in_turn
from compress.compressors.pruning.experts.genome import Space, chosen
from compress.progress import SilentProgress
from compress.recipes.experts import EepSettings

SPACE = Space(groups=3, kept=3, experts=6)
PLANTED = ((0, 2, 5), (1, 2, 3), (0, 1, 4))
"""The experts whose choice is the best there is."""
KEY = "0" * 64


def right(individual) -> int:
    """Return how many of the 9 planted experts are kept."""
    choice = chosen(individual.experts)
    return sum(len(set(row.tolist()) & set(planted)) for row, planted in zip(choice, PLANTED, strict=True))


def blend() -> np.ndarray:
    """Return merging coefficients that are better than any choice: a little of the others in every row."""
    found = np.full(SPACE.shape, 0.1, dtype=np.float32)
    for group, planted in enumerate(PLANTED):
        for row, expert in enumerate(planted):
            found[group, row, expert] = 0.8
    return found


def fitness(individual) -> float:
    """Return points up to 100: for the planted experts, and for coefficients near the blend."""
    distance = float(np.square(individual.experts.astype(np.float64) - blend()).sum())
    return 5.0 * right(individual) + 55.0 * float(np.exp(-distance))


def coarse(individual) -> float:
    """Return 10 points for every planted expert: full of ties, as accuracies on small splits are."""
    return 10.0 * right(individual)


def settings(**changes) -> EepSettings:
    return EepSettings.model_validate(
        {"keep_experts": 3, "init_random": 8, "prune_evals": 40, "total_evals": 70, **changes}
    )


def search(seed=0, given=None, **changes) -> Search:
    return Search(SPACE, settings(**changes), seed, given or {})


def finished(folder: Path, found: Search, evaluate=fitness, submit=None) -> Archive:
    """Return the archive of a search that was run to its end."""
    archive = Archive(folder, KEY, found.space)
    evolve(found, archive, submit or in_turn(evaluate), SilentProgress())
    return archive


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def slowly(individual) -> float:
    """Take a while that depends on the individual, so that evaluations overtake each other."""
    time.sleep(int(individual.sha256[:2], 16) / 256 * 0.02)
    return coarse(individual)


def main() -> None:
    """Run `landscape.py FOLDER WORKERS LAG [KILL_AT WHEN]`.

    With the last two the process kills itself, and those of its group, around the KILL_AT-th rename of a
    file: `before` it, `after` it, or as many calls of functions after it as WHEN says. It is to lead a group.
    """
    folder, workers, lag = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        _kill_at(int(sys.argv[4]), sys.argv[5])
    found = search(lag=lag)
    if workers == 1:
        finished(folder, found, slowly)
        return
    with ProcessPoolExecutor(workers) as pool:

        def submit(individual) -> Future[float]:
            return pool.submit(slowly, individual)

        finished(folder, found, submit=submit)


def _kill_at(count: int, when: str) -> None:
    """Let this process end by SIGKILL at a rename, the step that makes a file appear, or soon after it."""
    replace, done = Path.replace, 0

    def replace_or_die(path, target):
        nonlocal done
        done += 1
        if done == count and when == "before":
            _die()
        result = replace(path, target)
        if done == count:
            if when == "after":
                _die()
            _kill_after(int(when))
        return result

    Path.replace = replace_or_die


def _kill_after(calls: int) -> None:
    """Let this process end by SIGKILL once this thread has called so many functions, wherever that is."""

    def count_down(frame, event, argument):
        nonlocal calls
        if event in ("call", "c_call"):
            calls -= 1
            if calls <= 0:
                _die()

    sys.setprofile(count_down)


def _die() -> None:
    os.killpg(0, signal.SIGKILL)  # with the processes of its own, which would wait for ever


if __name__ == "__main__":
    main()
