"""A program that searches the landscape with workers: `judged.py FOLDER WORKERS LAG WHAT`."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import landscape
from compress.compressors.pruning.experts.workers import submitters
from compress.errors import CompressError, SourceError
from compress.recipes.workers import read_workers

FAILS = 20
"""Evaluations that a worker does before it fails."""


@dataclass(frozen=True)
class Landscape:
    """What the workers open.

    Attributes:
        what: `plain`; `slow`; `closed`, it cannot be opened; or what happens in a worker after some
            evaluations: `defect` of the program, `killed` by a signal.
        log: file that every worker adds its process to.
    """

    what: str
    log: Path
    name: str = "a landscape"

    def open(self):
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n")
        if self.what == "closed":
            raise SourceError("the folder is gone", hint="look where it went")
        done = 0

        def evaluate(individual) -> float:
            nonlocal done
            done += 1
            if self.what == "slow":
                time.sleep(0.1)
            elif done > FAILS and self.what != "plain":
                self._fail()
            return landscape.slowly(individual)

        return evaluate

    def _fail(self) -> None:
        if self.what == "defect":
            raise ZeroDivisionError("a defect")
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder, workers, lag = Path(sys.argv[1]), read_workers(sys.argv[2]), int(sys.argv[3])
    job = Landscape(sys.argv[4], folder.with_suffix(".log"))
    found = landscape.search(lag=lag)
    try:
        with submitters(job, workers, lag=lag) as submit:
            landscape.finished(folder, found, submit=submit)
    except (CompressError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error} ({getattr(error, 'hint', None)})")


if __name__ == "__main__":
    main()
