"""Bounds and quick answers for `allocation`, on numbered items: the Lagrangian dual and a greedy fill.

A problem is a multiple-choice knapsack: take one choice of every item, spend at most the limit of
every budget, and lose as little as possible. The dual prices the budgets and bounds the loss of every
assignment from below; `fill` buys the largest gain per price until nothing fits any more. Both take
milliseconds, and together they decide most items: HiGHS (`allocation_highs`) gets the rest.

Whether an assignment keeps its limits is always decided in Python's integers, never in floats.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Assignment = list[int]  # the number of the choice taken, item by item

_BISECTIONS = 200
_LARGEST_PRICE = 1e200  # keeps price times weight finite
_SMALLEST_PRICE = 1e-6  # of the largest: what a plentiful budget still costs


@dataclass(frozen=True)
class Problem:
    """A multiple-choice knapsack.

    Attributes:
        losses: [items][choices], finite.
        costs: [items][choices][budgets], whole and not negative; 0 where a budget does not cover an item.
        limits: [budgets], the most that may be spent.
        floors: [budgets], the least that must be spent; 0 where a budget is one-sided.
    """

    losses: Sequence[Sequence[float]]
    costs: Sequence[Sequence[tuple[int, ...]]]
    limits: tuple[int, ...]
    floors: tuple[int, ...]

    @cached_property
    def cheapest(self) -> list[tuple[int, ...]]:
        """[items][budgets]: the least that each item can cost, budget by budget."""
        return [tuple(map(min, zip(*choices, strict=True))) for choices in self.costs]

    @cached_property
    def room(self) -> list[int]:
        """[budgets]: what is left of each limit with every item at its cheapest; may be negative."""
        spent = map(sum, zip(*self.cheapest, strict=True))
        return [limit - least for limit, least in zip(self.limits, spent, strict=True)]

    @cached_property
    def starts(self) -> NDArray[np.intp]:
        """[items]: place of each item's first choice in the flat arrays."""
        return np.cumsum([0, *map(len, self.losses[:-1])], dtype=np.intp)

    @cached_property
    def owner(self) -> NDArray[np.intp]:
        """[all choices]: number of the item that a choice belongs to."""
        return np.repeat(np.arange(len(self.losses), dtype=np.intp), [len(row) for row in self.losses])

    @cached_property
    def excess(self) -> Floats:
        """[all choices]: loss above the item's best choice."""
        return np.array([loss - min(row) for row in self.losses for loss in row])

    @cached_property
    def weight(self) -> Floats:
        """[budgets, all choices]: cost above the item's cheapest choice, as a share of the room."""
        rows = [
            [(cost[k] - least[k]) / max(self.room[k], 1) for cost in row]
            for k in range(len(self.limits))
            for row, least in [(self.costs[i], self.cheapest[i]) for i in range(len(self.costs))]
        ]
        flat = [value for row in rows for value in row]
        return np.array(flat).reshape(len(self.limits), -1)

    @property
    def best(self) -> float:
        """Loss with every item at its best choice: the least of all, whatever it costs."""
        return math.fsum(min(row) for row in self.losses)

    @property
    def worst(self) -> float:
        """Loss with every item at its worst choice."""
        return math.fsum(max(row) for row in self.losses)

    def loss(self, assignment: Assignment) -> float:
        """Return the loss of an assignment, rounded once."""
        return math.fsum(row[j] for row, j in zip(self.losses, assignment, strict=True))

    def spent(self, assignment: Assignment) -> tuple[int, ...]:
        """Return what an assignment costs, budget by budget, exactly."""
        columns = zip(*(row[j] for row, j in zip(self.costs, assignment, strict=True)), strict=True)
        return tuple(map(sum, columns))

    def permits(self, assignment: Assignment) -> bool:
        """Return whether an assignment keeps every limit and reaches every floor."""
        spent = self.spent(assignment)
        return all(low <= s <= high for low, s, high in zip(self.floors, spent, self.limits, strict=True))

    def flat(self, assignment: Assignment) -> NDArray[np.intp]:
        """Return the places of an assignment's choices in the flat arrays."""
        return self.starts + np.array(assignment, dtype=np.intp)

    def unflat(self, places: NDArray[np.intp]) -> Assignment:
        """Return the assignment whose choices stand at these places of the flat arrays."""
        return [int(j) for j in places - self.starts]

    def only(self, kept: Sequence[Sequence[int]]) -> Problem:
        """Return the problem with only these choices of every item."""
        return Problem(
            [[row[j] for j in js] for row, js in zip(self.losses, kept, strict=True)],
            [[row[j] for j in js] for row, js in zip(self.costs, kept, strict=True)],
            self.limits,
            self.floors,
        )


def affordable(problem: Problem) -> list[list[int]]:
    """Return, for every item, the choices that fit when all other items take their cheapest."""
    return [
        [
            j
            for j, cost in enumerate(row)
            if all(c - low <= room for c, low, room in zip(cost, least, problem.room, strict=True))
        ]
        for row, least in zip(problem.costs, problem.cheapest, strict=True)
    ]


@dataclass(frozen=True)
class Dual:
    """A point of the Lagrangian dual.

    Attributes:
        prices: [budgets], loss per share of the room; not negative.
        bound: no permitted assignment loses less than this above `Problem.best`.
        reduced: [all choices], by how much the bound grows for assignments that take a choice.
        minimiser: the assignment that attains the bound; it may spend more than there is.
    """

    prices: Floats
    bound: float
    reduced: Floats
    minimiser: Assignment


def lagrangian(problem: Problem) -> Dual:
    """Maximise the Lagrangian dual: sum_i min_j (loss_ij + price . cost_ij) - price . room.

    One budget: bisection on the price. Several: the prices are the dual values of the linear
    relaxation, found by HiGHS. Whatever the prices, the bound is evaluated here and holds; better
    prices only make it tighter. At its maximum it equals the bound of the linear relaxation.
    """
    prices = _bisect(problem) if len(problem.limits) == 1 else _relaxation_prices(problem)
    return _dual(problem, prices)


def _dual(problem: Problem, prices: Floats) -> Dual:
    priced = problem.excess + prices @ problem.weight
    least = np.minimum.reduceat(priced, problem.starts)
    reduced = priced - least[problem.owner]
    rooms = [float(price) for price, room in zip(prices, problem.room, strict=True) if room > 0]
    at_minimum = np.flatnonzero(reduced == 0)
    _, first = np.unique(problem.owner[at_minimum], return_index=True)
    minimiser = problem.unflat(at_minimum[first])
    return Dual(prices, math.fsum([*least, *(-price for price in rooms)]), reduced, minimiser)


def _bisect(problem: Problem) -> Floats:
    """Return the best price of the only budget."""
    weight, room = problem.weight[0], 1.0 if problem.room[0] > 0 else 0.0
    if not weight.any():
        return np.zeros(1)

    def spent(price: float) -> float:
        dual = _dual(problem, np.array([price]))
        return float(weight[problem.flat(dual.minimiser)].sum())

    # Above this price even the smallest saving outweighs the largest loss.
    low, high = 0.0, min(2.0 * float(problem.excess.max() / weight[weight > 0].min()), _LARGEST_PRICE)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if spent(middle) > room:
            low = middle
        else:
            high = middle
    return max((np.array([low]), np.array([high])), key=lambda prices: _dual(problem, prices).bound)


def choose_one(owner: NDArray[np.intp]) -> csr_array:
    """Return the matrix of "one choice of every item"; `owner` numbers the items 0, 1, ... in order."""
    count = len(owner)
    return csr_array((np.ones(count), (owner, np.arange(count))), shape=(int(owner.max()) + 1, count))


def _relaxation_prices(problem: Problem) -> Floats:
    """Return the prices of several budgets from the linear relaxation; 0 where HiGHS finds none."""
    none = np.zeros(len(problem.limits))
    range_ = float(np.maximum.reduceat(problem.excess, problem.starts).sum())
    if range_ == 0:
        return none
    result = linprog(
        problem.excess / range_ * len(problem.losses),  # about 1 each
        A_ub=csr_array(problem.weight),
        b_ub=[1.0 if room > 0 else 0.0 for room in problem.room],
        A_eq=choose_one(problem.owner),
        b_eq=np.ones(len(problem.losses)),
        method="highs",
    )
    if result.status != 0:
        return none
    prices: Floats = np.maximum(-result.ineqlin.marginals, 0.0) * range_ / len(problem.losses)
    return prices


def fill(problem: Problem, assignment: Assignment, prices: Floats) -> Assignment:
    """Spend what is left: take the largest gain per price that still fits, until none does.

    A move gives one item another choice, with a lower loss, or with the same loss at a higher price.
    Started at the cheapest choices it is the greedy algorithm for this knapsack; started at another
    assignment it can only improve it.

    Args:
        problem: costs and losses.
        assignment: where to start; it keeps every limit (a floor may still be ahead).
        prices: [budgets], what the dual says a share of each budget is worth.
    """
    top = float(prices.max(initial=0.0))
    # A budget that the dual finds plentiful still costs a little, so that nothing is bought for nothing.
    priced = (np.maximum(prices, _SMALLEST_PRICE * top) if top else np.ones(len(prices))) @ problem.weight
    chosen = list(assignment)
    left = [limit - spent for limit, spent in zip(problem.limits, problem.spent(chosen), strict=True)]
    over = [limit - floor for limit, floor in zip(problem.limits, problem.floors, strict=True)]

    def step(i: int) -> tuple[float, float, int, int] | None:
        """Return the best move of an item as (-gain per price, -gain, item, choice)."""
        row, costs, start, now = problem.losses[i], problem.costs[i], int(problem.starts[i]), chosen[i]
        moves = []
        for j, loss in enumerate(row):
            gain, price = row[now] - loss, float(priced[start + j] - priced[start + now])
            if j == now or gain < 0 or (gain == 0 and price <= 0):
                continue
            if _fits(costs[now], costs[j], left, over):
                moves.append((-gain / price if price > 0 else -math.inf, -gain, i, j))
        return min(moves, default=None)

    heap = [move for i in range(len(chosen)) if (move := step(i))]
    heapq.heapify(heap)
    while heap:
        _, _, i, j = heapq.heappop(heap)
        now, costs = chosen[i], problem.costs[i]
        if _fits(costs[now], costs[j], left, over):
            left = [room - new + old for room, new, old in zip(left, costs[j], costs[now], strict=True)]
            chosen[i] = j
        if move := step(i):
            heapq.heappush(heap, move)
    return chosen


def _fits(old: tuple[int, ...], new: tuple[int, ...], left: list[int], over: list[int]) -> bool:
    """Return whether a change of cost keeps the limits, and leaves no floor further away.

    Args:
        old: cost of the present choice.
        new: cost of the other one.
        left: limit - spent.
        over: limit - floor: more than this may not be left.
    """
    return all(
        n - o <= room and (n >= o or room - n + o <= most)
        for o, n, room, most in zip(old, new, left, over, strict=True)
    )


def repair(problem: Problem, assignment: Assignment) -> Assignment | None:
    """Bring an assignment under its limits, losing little per unit saved.

    Returns:
        An assignment that keeps every limit, or None where single changes do not lead to one.
    """
    chosen = list(assignment)
    for _ in range(len(problem.owner)):
        spent = problem.spent(chosen)
        over = np.array([s - limit for s, limit in zip(spent, problem.limits, strict=True)], dtype=float)
        if (over <= 0).all():
            return chosen
        scale = np.maximum(np.array(problem.room, dtype=float), 1.0)
        now = problem.flat(chosen)
        saved = problem.weight[:, now][:, problem.owner] - problem.weight
        over = (over / scale)[:, None]
        relief = np.minimum(saved, over).clip(min=0)[over[:, 0] > 0].sum(0)
        harmless = ((saved >= 0) | (-saved <= -over)).all(0)
        lost = problem.excess - problem.excess[now][problem.owner]
        usable = np.flatnonzero((relief > 0) & harmless)
        if not len(usable):
            return None
        # Among moves that lose nothing the one that saves most goes first.
        rate = np.where(lost[usable] > 0, lost[usable] / relief[usable], lost[usable] * relief[usable])
        place = int(usable[np.lexsort((-relief[usable], rate))[0]])
        item = int(problem.owner[place])
        chosen[item] = place - int(problem.starts[item])
    return None


def greedy(problem: Problem, dual: Dual) -> Assignment | None:
    """Return a permitted assignment without HiGHS, or None where none is found.

    The better of two: `fill` from the cheapest choices, and from the minimiser of the dual.
    """
    cost = problem.weight.sum(0)
    order = np.lexsort((problem.excess, cost, problem.owner))
    cheapest = problem.unflat(order[problem.starts])
    found = []
    for start in (cheapest, dual.minimiser):
        kept = repair(problem, start)
        filled = fill(problem, kept, dual.prices) if kept else None
        if filled and problem.permits(filled):
            found.append(filled)
    return min(found, key=problem.loss, default=None)


def undecided(problem: Problem, dual: Dual, excess: float) -> list[list[int]]:
    """Return the choices that an assignment as good as a known one may take, item by item.

    A choice whose reduced cost lifts the bound above the known loss is in no better assignment
    (reduced-cost fixing); on bit allocations this decides all but some dozens of items.

    Args:
        problem: costs and losses.
        dual: its bound.
        excess: loss of the known assignment above `Problem.best`.
    """
    rounding = 1e-9 * abs(excess) + 1e-12 * float(dual.prices.sum())  # sums of floats may be wrong by it
    keep = dual.bound + dual.reduced <= excess + rounding
    keep |= dual.reduced == 0
    ends = [*problem.starts[1:], len(keep)]
    return [
        [int(j) for j in np.flatnonzero(keep[start:end])]
        for start, end in zip(problem.starts, ends, strict=True)
    ]
