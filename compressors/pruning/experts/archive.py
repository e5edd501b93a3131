"""What a search has evaluated, on disk: one safetensors file per individual, whole or absent.

A file holds the coefficients and, in its header, their fitness: no kill can leave one without the other. It
is written under another name, flushed, and renamed. So a search that was killed has lost at most what was
being evaluated; it breeds the same children again (`evolution`), finds those that are here, and evaluates the
others. Second scores of the best lie beside them, in a JSON file each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ....errors import StageError
from ....runtime.atomic import atomic_file, sweep_partials
from .genome import Individual, Space, from_arrays, to_arrays

_ABOUT = "evaluation"  # the only key: the order of several is not the same in every process
_NAME = re.compile(r"(\d{6,})\.safetensors")


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        index: its place in the order in which individuals were bred, from 0.
        individual: what was evaluated.
        fitness: in points; never NaN, minus infinity where the model failed.
        origin: `kind` (random, given, mutation, crossover), `phase` (1 or 2), `parents` (their places),
            `name` of a given one.
    """

    index: int
    individual: Individual = field(repr=False)
    fitness: float
    origin: Mapping[str, Any]


class Archive:
    """All evaluations of one search.

    Args:
        folder: of these alone; made where it is absent. One process at a time may write there.
        key: content hash of all that decides a fitness: weights, data, settings, space, seed.
        space: of the individuals.

    Raises:
        StageError: a file in the folder is damaged, or of another search.
    """

    def __init__(self, folder: Path, key: str, space: Space) -> None:
        self._folder, self._key, self._space = folder, key, space
        folder.mkdir(parents=True, exist_ok=True)
        sweep_partials(folder)
        self._records: dict[int, Record] = {}
        self._second: dict[str, float] = {}
        for path in sorted(folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match:
                self._records[int(match[1])] = self._read(path, int(match[1]))
        for path in sorted(folder.glob("dev-*.json")):
            self._read_second(path)

    def __contains__(self, index: object) -> bool:
        return index in self._records

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def first(self, count: int) -> list[Record]:
        """Return the records 0 to count - 1.

        Raises:
            KeyError: one of them is not evaluated.
        """
        return [self._records[index] for index in range(count)]

    def records(self) -> list[Record]:
        """Return all of them in the order of the search, whichever finished first."""
        return [self._records[index] for index in sorted(self._records)]

    def add(self, record: Record) -> None:
        """Keep an evaluation; it is on the disk when this returns.

        Raises:
            StageError: its fitness is no score.
        """
        _check(record.fitness, f"evaluation {record.index}")
        about = {
            "key": self._key,
            "fitness": record.fitness.hex(),  # exact, and knows infinity
            "origin": dict(record.origin),
            "sha256": record.individual.sha256,
        }
        text = {_ABOUT: json.dumps(about, sort_keys=True)}
        with atomic_file(self._path(record.index)) as temporary:
            save_file(_writable(to_arrays(record.individual)), temporary, metadata=text)
        self._records[record.index] = record

    def has_second(self, record: Record) -> bool:
        """Tell whether an individual has a score on the dev split."""
        return record.individual.sha256 in self._second

    def second(self, record: Record) -> float:
        """Return the score on the dev split.

        Raises:
            KeyError: there is none.
        """
        return self._second[record.individual.sha256]

    def add_second(self, record: Record, score: float) -> None:
        """Keep a score on the dev split.

        Raises:
            StageError: it is none.
        """
        _check(score, f"second score of evaluation {record.index}")
        about = {"key": self._key, "fitness": score.hex(), "sha256": record.individual.sha256}
        with atomic_file(self._folder / f"dev-{record.index:06d}.json") as temporary:
            temporary.write_text(json.dumps(about, sort_keys=True) + "\n", encoding="utf-8")
        self._second[record.individual.sha256] = score

    def history(self, count: int) -> list[dict[str, Any]]:
        """Return a JSON row of each of the first evaluations, for the report.

        Args:
            count: of a search that is finished: its evaluations in all.

        Returns:
            Rows of `index`, `fitness`, `best` so far and what `Record.origin` has; None stands for minus
            infinity.
        """
        rows, best = [], -math.inf
        for record in self.first(count):
            best = max(best, record.fitness)
            rows.append(
                {
                    "index": record.index,
                    "fitness": _finite(record.fitness),
                    "best": _finite(best),
                    **record.origin,
                }
            )
        return rows

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.safetensors"

    def _read(self, path: Path, index: int) -> Record:
        try:
            with safe_open(path, framework="np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                text = (file.metadata() or {})[_ABOUT]
            about = json.loads(text)
            individual = from_arrays(arrays, self._space)
            fitness, origin = _fitness(about["fitness"]), dict(about["origin"])
            whole = about["sha256"] == individual.sha256
        except (OSError, SafetensorError, TypeError, LookupError, ValueError) as error:
            raise self._damaged(path, str(error)) from None
        self._check_about(path, about["key"] if whole else None)
        return Record(index, individual, fitness, origin)

    def _read_second(self, path: Path) -> None:
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            key, sha256, score = about["key"], str(about["sha256"]), _fitness(about["fitness"])
        except (OSError, TypeError, LookupError, ValueError) as error:
            raise self._damaged(path, str(error)) from None
        self._check_about(path, key)
        self._second[sha256] = score

    def _check_about(self, path: Path, key: object) -> None:
        if key is None:
            raise self._damaged(path, "the values are not those that were written")
        if key != self._key:
            raise StageError(
                f"{path}: an evaluation of another search", hint=f"remove {path.parent} to start over"
            )

    def _damaged(self, path: Path, why: str) -> StageError:
        return StageError(
            f"{path}: no evaluation can be read from it ({why})",
            hint="remove this file: only this evaluation is done again",
        )


def _writable(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Any]:
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def _fitness(text: str) -> float:
    value = float.fromhex(text)
    if math.isnan(value):
        raise ValueError("the fitness is NaN")
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check(fitness: float, what: str) -> None:
    if math.isnan(fitness) or fitness == math.inf:
        raise StageError(
            f"{what}: the fitness is {fitness}, which is no score",
            hint="a fitness is a finite number, or minus infinity for a model that failed",
        )
