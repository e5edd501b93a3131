"""The search: who is evaluated, in which order, and who is the best in the end. It knows no model.

A steady state: every individual that was ever evaluated can be a parent. The first ones are drawn at random
or given; then children choose experts, and from evaluation `prune_evals` on their coefficients are real
numbers (arXiv 2407.00945). Where all experts stay, the search starts from the identity and only merges.

What child i is depends on the seed, on i, and on the fitness of the individuals 0 to i - lag alone (and of
the first ones in any case), never on who finished when or where. Up to `lag` evaluations go on at once. So
with an equal lag, any number of workers finds the same, bit for bit, as one; more workers than `lag` have
nothing to do. A lag of 1 is the steady state of a single process; a larger one breeds from a little less.
What is new is told from all that was bred before, finished or not: that does not depend on workers either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....errors import StageError
from ....progress import Progress, step
from ....recipes.experts import EepSettings
from ....runtime.hashes import digest
from .archive import Archive, Record
from .genome import Individual, Space, identity, random_choice
from .operators import add_noise, cross_rows, divide_by_sums, draw_flags, swap_experts
from .selection import best, one_parent, two_parents

Submit = Callable[[Individual], Future[float]]
"""Starts an evaluation and returns at once; the result is the fitness in points."""
_NOT_OF_CHILDREN = {"total_evals", "dev_top", "random_draws", "export", "fitness", "splits", "seed"}
_TRIES = 200
"""Children that are bred before a search gives up finding one that is new."""


@dataclass(frozen=True)
class Search:
    """All that decides who is evaluated, but for the fitness.

    Attributes:
        space: of the individuals.
        settings: rates and budgets.
        seed: of everything random.
        given: name -> individual that only chooses, evaluated behind the random ones. One that equals
            another is evaluated once. Empty where all experts stay.
    """

    space: Space
    settings: EepSettings
    seed: int
    given: Mapping[str, Individual] = field(default_factory=dict)

    @property
    def merges_only(self) -> bool:
        """Whether there is nothing to choose."""
        return self.space.kept == self.space.experts

    @property
    def prune_evals(self) -> int:
        """Evaluations that choose experts; not more than there are choices."""
        return 1 if self.merges_only else min(self.settings.prune_evals, self.space.choices)

    @property
    def total_evals(self) -> int:
        """Evaluations in all."""
        return self.settings.total_evals if self.settings.merges else self.prune_evals

    def key(self, fitness: str) -> str:
        """Return the content hash that an archive of this search has.

        Longer searches have the same: they begin with the evaluations of shorter ones.

        Args:
            fitness: content hash of what decides scores: weights, data of train and dev, how they are
                measured.
        """
        rates = self.settings.model_dump(mode="json", exclude=_NOT_OF_CHILDREN)
        shape = [self.space.groups, self.space.kept, self.space.experts, self.space.pools]
        given = [[name, individual.sha256] for name, individual in self.given.items()]
        return digest([fitness, rates, shape, self.seed, given])


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the fittest of all; by the second score, where there is one.
        pruned: the fittest of those that only choose; None where all experts stay.
        given: name -> the evaluation of a given individual.
    """

    best: Record
    pruned: Record | None
    given: Mapping[str, Record]


@dataclass(frozen=True)
class _Bred:
    """An individual before its evaluation."""

    individual: Individual
    origin: dict[str, Any]


def evolve(search: Search, archive: Archive, submit: Submit, progress: Progress) -> None:
    """Evaluate all individuals of a search that the archive does not hold yet.

    Every evaluation is kept as soon as it is finished, in whichever order they finish.

    Args:
        search: what to do.
        archive: of this search; empty, or of a run that was killed.
        submit: `in_turn(fitness)`, or what hands individuals to other processes. It is called for up to
            `lag` individuals before the first of them is finished.
        progress: advances with every evaluation.

    Raises:
        StageError: a fitness is no score; no individual is new any more; or the archive holds others than
            this search breeds.
        Exception: what an evaluation raises. What is finished is kept.
    """
    first = starts(search)
    seen = {bred.individual.sha256 for bred in first}
    running: dict[Future[float], Record] = {}
    with step(progress, "evolution", search.total_evals):
        try:
            for index in range(search.total_evals):
                if index < len(first):
                    known = max(0, index - search.settings.lag + 1)
                else:
                    known = max(len(first), index - search.settings.lag + 1)
                _collect(running, archive, known, progress)
                if index < len(first):
                    bred = first[index]
                else:
                    bred = breed(search, index, archive.first(known), seen)
                    seen.add(bred.individual.sha256)
                if index in archive:
                    _check_same(archive[index], bred)
                    progress.advance(detail=_told(archive[index]))
                else:
                    record = Record(index, bred.individual, 0.0, bred.origin)
                    running[submit(bred.individual)] = record
            _collect(running, archive, search.total_evals, progress)
        finally:
            for future in running:
                future.cancel()


def in_turn(evaluate: Callable[[Individual], float]) -> Submit:
    """Return a `Submit` that evaluates in this process, before it returns.

    Args:
        evaluate: returns the fitness in points.
    """

    def submit(individual: Individual) -> Future[float]:
        future: Future[float] = Future()
        future.set_result(evaluate(individual))
        return future

    return submit


def starts(search: Search) -> list[_Bred]:
    """Return the first individuals: drawn at random, all different, then the given ones that are new.

    There are fewer where there are fewer choices. Where all experts stay, it is the identity alone.

    Raises:
        ValueError: a given one is no choice of this space, or there are more than `prune_evals`.
    """
    if search.merges_only:
        return [
            _Bred(identity(search.space), {"kind": "given", "phase": 1, "parents": [], "name": "identity"})
        ]
    found: dict[str, _Bred] = {}
    count = min(search.settings.init_random, search.prune_evals)
    for index in range(count):
        generator = _generator(search.seed, index)
        individual = random_choice(search.space, generator)
        while individual.sha256 in found:  # ends: there are more choices than individuals
            individual = random_choice(search.space, generator)
        found[individual.sha256] = _Bred(individual, {"kind": "random", "phase": 1, "parents": []})
    for name, individual in search.given.items():
        if not individual.is_choice or individual.router.shape != search.space.shape:
            raise ValueError(f"{name} is no choice among the experts of this search")
        origin = {"kind": "given", "phase": 1, "parents": [], "name": name}
        found.setdefault(individual.sha256, _Bred(individual, origin))
    if len(found) > search.prune_evals:
        raise ValueError(f"{len(found)} first individuals, but prune_evals is {search.prune_evals}")
    return list(found.values())


def breed(search: Search, index: int, known: Sequence[Record], seen: set[str]) -> _Bred:
    """Return the child with this place in the search.

    Args:
        search: all of it.
        index: of the child; from `prune_evals` on it merges.
        known: evaluations that it may descend from, in their order.
        seen: hashes of all individuals bred before it; the child is none of them.

    Raises:
        StageError: none of many children is new.
    """
    generator = _generator(search.seed, index)
    child = _merging_child if index >= search.prune_evals else _choosing_child
    for _ in range(_TRIES):
        bred = child(search, known, generator)
        if bred.individual.sha256 not in seen:
            return bred
    if index >= search.prune_evals:
        raise StageError(
            f"evaluation {index}: none of {_TRIES} children differs from all before it",
            hint="raise mut_entry, group_flag or mut_sigma, or lower total_evals",
        )
    individual = random_choice(search.space, generator)
    while individual.sha256 in seen:  # ends: `prune_evals` is not more than there are choices
        individual = random_choice(search.space, generator)
    return _Bred(individual, {"kind": "random", "phase": 1, "parents": []})


def choose(
    search: Search,
    archive: Archive,
    second: Submit | None = None,
    *,
    progress: Progress,
) -> Found:
    """Return the best of a finished search.

    Args:
        search: which `evolve` has finished.
        archive: of it.
        second: as `submit` of `evolve`, for scores on the dev split; the `dev_top` fittest get one, of
            those that only choose and of all, up to `lag` at once. It is kept in the archive as soon as it
            is there. None: the first score decides.
        progress: advances with every second score.

    Raises:
        StageError: a second score is none.
    """
    records = archive.first(search.total_evals)
    by_hash = {record.individual.sha256: record for record in records}

    def fittest(among: Sequence[Record]) -> Record:
        if second is None:
            return best(among)[0]
        return _best_again(among, search.settings, archive, second, progress)

    return Found(
        pruned=None if search.merges_only else fittest(records[: search.prune_evals]),
        best=fittest(records),
        given={name: by_hash[item.sha256] for name, item in search.given.items() if item.sha256 in by_hash},
    )


def _best_again(
    records: Sequence[Record],
    settings: EepSettings,
    archive: Archive,
    second: Submit,
    progress: Progress,
) -> Record:
    """Return the record with the best second score; of equal ones that with the better first."""
    top = best(records, settings.dev_top)
    missing = [record for record in top if not archive.has_second(record)]
    running: list[Future[float]] = []
    with step(progress, "second scores", len(missing)):
        try:
            for place, record in enumerate(missing):
                ahead = missing[len(running) : place + settings.lag]
                running += [second(other.individual) for other in ahead]
                score = float(running[place].result())
                archive.add_second(record, score)
                progress.advance(detail=f"{score:.2f}")
        finally:
            for future in running:
                future.cancel()
    return max(top, key=archive.second)


def _generator(seed: int, index: int) -> np.random.Generator:
    """Return the generator of one individual, independent of all others."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(index,)))


def _choosing_child(search: Search, known: Sequence[Record], generator: np.random.Generator) -> _Bred:
    settings = search.settings
    parent = one_parent(known, settings, generator)
    flags = draw_flags(search.space.groups, 1, settings.group_flag, generator)
    child = swap_experts(parent.individual, search.space, flags, settings.mut_row, generator)
    # Row sums are not divided by: those of a choice are 1.
    return _Bred(child, {"kind": "mutation", "phase": 1, "parents": [parent.index]})


def _merging_child(search: Search, known: Sequence[Record], generator: np.random.Generator) -> _Bred:
    settings = search.settings
    matrices = 2 if settings.router == "free" else 1
    flags = draw_flags(search.space.groups, matrices, settings.group_flag, generator)
    if len(known) > 1 and generator.random() < settings.crossover:
        pair = two_parents(known, settings, generator)
        child = cross_rows([record.individual for record in pair], flags, settings.front_prob, generator)
        origin = {"kind": "crossover", "phase": 2, "parents": [record.index for record in pair]}
    else:
        parent = one_parent(known, settings, generator)
        child, origin = parent.individual, {"kind": "mutation", "phase": 2, "parents": [parent.index]}
    child = add_noise(child, flags, settings, generator)
    if generator.random() < settings.norm_prob:
        child = divide_by_sums(child)
    return _Bred(child, origin)


def _collect(running: dict[Future[float], Record], archive: Archive, count: int, progress: Progress) -> None:
    """Keep what is finished, and wait until the first `count` evaluations are."""
    while True:
        failed = []
        for future in [future for future in running if future.done()]:
            bred = running.pop(future)
            if future.exception() is not None:
                failed.append(future)
                continue
            record = Record(bred.index, bred.individual, float(future.result()), bred.origin)
            archive.add(record)
            progress.advance(detail=_told(record))
        if failed:
            failed[0].result()  # raises; what finished beside it is kept
        if not any(record.index < count for record in running.values()):
            return
        wait(running, return_when=FIRST_COMPLETED)


def _check_same(record: Record, bred: _Bred) -> None:
    """Refuse to go on with what this search would not have evaluated.

    Raises:
        StageError: another version of the program, or of numpy, has written the archive.
    """
    if record.individual.sha256 != bred.individual.sha256:
        raise StageError(
            f"evaluation {record.index} of the kept archive is of another individual than this search breeds",
            hint="it was kept by another version; remove the archive's folder to start over",
        )


def _told(record: Record) -> str:
    return f"{record.origin['kind']} {record.fitness:.2f}"
