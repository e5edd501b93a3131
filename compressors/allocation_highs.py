"""The exact part of `allocation`: a multiple-choice knapsack as a mixed-integer program for HiGHS.

HiGHS computes in floating point, with tolerances. Costs reach it relative to each item's cheapest
choice and divided by their greatest common divisor; what it returns is added up again in Python's
integers, and what oversteps a limit is cut off exactly, or repaired.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from .allocation_bounds import Assignment, Floats, Problem, choose_one, repair

_LARGEST_COEFFICIENT = 1 << 16  # of a budget's row; HiGHS tolerates 1e-6, far less than one unit of it
_LARGEST_OBJECTIVE = float(1 << 20)  # HiGHS stops at an absolute gap of 1e-6
_ROUNDS = 12  # programs solved before an answer that is still over a limit is repaired instead
_STATUS = {0: "optimal", 1: "limit", 2: "infeasible"}  # of scipy's milp
_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Answer:
    """What HiGHS found.

    Attributes:
        assignment: permitted in exact integers; None where it found none.
        bound: no permitted assignment has a smaller objective; -inf where it proved nothing.
        stopped: "optimal", "limit" (of time or nodes), "infeasible" or "failed".
    """

    assignment: Assignment | None
    bound: float
    stopped: str


def solve(
    problem: Problem,
    objective: Floats,
    *,
    mip_rel_gap: float,
    time_limit: float,
    node_limit: int | None = None,
) -> Answer:
    """Minimise the sum of `objective` over the permitted assignments with HiGHS.

    HiGHS may overstep a limit within its tolerance, by some units in 10^11. Then the items that
    overspend are forbidden together, exactly, and the program is solved again.

    Args:
        problem: costs and limits.
        objective: [all choices], not negative.
        mip_rel_gap: relative to the objective, 0 for a proven optimum.
        time_limit: seconds.
        node_limit: of the search tree; unlike a limit of time, it gives the same answer anywhere.
    """
    largest = float(np.maximum.reduceat(objective, problem.starts).sum())
    scale = _LARGEST_OBJECTIVE / largest if largest else 1.0
    options: dict[str, Any] = {"mip_rel_gap": mip_rel_gap}
    if node_limit is not None:
        options["node_limit"] = node_limit
    deadline = time.monotonic() + time_limit
    chosen: Assignment | None = None
    covers: list[NDArray[np.intp]] = []
    bound, stopped = -math.inf, "failed"
    for _ in range(_ROUNDS):
        options["time_limit"] = max(deadline - time.monotonic(), 0.01)
        result, free = _run_highs(problem, covers, objective * scale, options)
        stopped = _STATUS.get(result.status, "failed")
        dual = result.mip_dual_bound
        if stopped != "infeasible" and dual is not None and math.isfinite(dual):
            bound = max(bound, float(dual) / scale)
        if result.x is None:
            break
        chosen = _largest(problem, free, result.x)
        over = [k for k, spent in enumerate(problem.spent(chosen)) if spent > problem.limits[k]]
        if not over or time.monotonic() > deadline:
            break
        covers += [_cover(problem, chosen, k) for k in over]
    repaired = repair(problem, chosen) if chosen is not None else None
    permitted = repaired if repaired is not None and problem.permits(repaired) else None
    return Answer(permitted, bound, stopped)


def _cover(problem: Problem, chosen: Assignment, k: int) -> NDArray[np.intp]:
    """Return places of which a permitted assignment takes at least one less than there are items in them.

    A few items that overspend budget `k` whatever the others take: every choice at least as dear as the
    present one, item by item, as few items as possible. Forbidding them all at once loses nothing.
    """
    costs, cheapest = problem.costs, problem.cheapest
    extra = [costs[i][j][k] - cheapest[i][k] for i, j in enumerate(chosen)]
    spent, items = 0, []
    for i in sorted(range(len(chosen)), key=lambda i: -extra[i]):
        items.append(i)
        spent += extra[i]
        if spent > problem.room[k]:
            break
    return np.array(
        [
            int(problem.starts[i]) + j
            for i in items
            for j, cost in enumerate(costs[i])
            if cost[k] >= costs[i][chosen[i]][k]
        ],
        dtype=np.intp,
    )


def _largest(problem: Problem, free: NDArray[np.intp], x: Floats) -> Assignment:
    """Return the assignment that takes the choice with the largest variable of every item."""
    values = np.ones(len(problem.owner))
    values[free] = x
    order = np.lexsort((-values, problem.owner))
    return problem.unflat(order[problem.starts])


def _run_highs(
    problem: Problem, covers: list[NDArray[np.intp]], objective: Floats, options: dict[str, Any]
) -> tuple[Any, NDArray[np.intp]]:
    """Solve the program of the items that have more than one choice left; return it and their places."""
    counts = np.bincount(problem.owner)
    free = np.flatnonzero(counts[problem.owner] > 1)
    if not len(free):  # HiGHS refuses a program without variables
        free = np.arange(len(problem.owner))
    _, owner = np.unique(problem.owner[free], return_inverse=True)
    constraints = [LinearConstraint(choose_one(owner), 1, 1)]
    constraints += [row for k in range(len(problem.limits)) for row in _row(problem, k, free)]
    for cover in covers:
        row = np.isin(free, cover).astype(float)
        count = len(np.unique(problem.owner[cover]))
        always = count - len(np.unique(problem.owner[free[row > 0]]))  # items without another choice
        constraints.append(LinearConstraint(csr_array(row.reshape(1, -1)), -np.inf, count - 1 - always))
    with _silenced_stdout():
        result = milp(
            objective[free],
            constraints=constraints,
            integrality=np.ones(len(free)),
            bounds=Bounds(0, 1),
            options=dict(options),
        )
    return result, free


def _row(problem: Problem, k: int, free: NDArray[np.intp]) -> Iterator[LinearConstraint]:
    """Yield the row of a budget, in small numbers; none where it cannot bind."""
    extra = [
        cost[k] - least[k] for row, least in zip(problem.costs, problem.cheapest, strict=True) for cost in row
    ]
    room = problem.room[k]
    floor = problem.floors[k] - (problem.limits[k] - room)
    divisor = math.gcd(*extra) or 1
    numbers = [value // divisor for value in extra]
    most = sum(int(value) for value in np.maximum.reduceat(np.array(numbers, dtype=object), problem.starts))
    room, floor = room // divisor, -(-floor // divisor)
    if room >= most and floor <= 0:
        return
    shrink = 1.0
    while max(numbers) * shrink > _LARGEST_COEFFICIENT:
        shrink /= 2  # a power of two rounds nothing by itself
    row = np.array([numbers[place] * shrink for place in free])
    low = floor * shrink if floor > 0 else -np.inf
    yield LinearConstraint(csr_array(row.reshape(1, -1)), low, room * shrink if room < most else np.inf)


@contextlib.contextmanager
def _silenced_stdout() -> Iterator[None]:
    """Keep HiGHS from writing to standard output, which belongs to the caller's JSON.

    Some versions print a debugging line with C's printf when they polish a solution, whatever their
    options say. One solve at a time: two threads would restore each other's descriptors.
    """
    with _stdout_lock:
        if os.name != "posix":
            yield
            return
        library = ctypes.CDLL(None)
        try:
            kept = os.dup(1)
        except OSError:  # standard output is closed: nothing to protect
            kept = -1
        if kept < 0:
            yield
            return
        library.fflush(None)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            yield
        finally:
            library.fflush(None)  # what printf still holds must go while the descriptor is turned away
            os.dup2(kept, 1)
            os.close(kept)
            os.close(quiet)
