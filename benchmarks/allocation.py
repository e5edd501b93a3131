"""The integer program of bit allocation: seconds, gaps and bounds on synthetic networks of several sizes.

"random": layers of random sizes, losses that fall about four-fold per bit. "hard": few distinct sizes and
rounded losses, so that many assignments tie. "ties": a loss proportional to the bytes saved, even sizes and
an odd budget, a pure subset-sum, whose optimum no solver proves in time; it ends at its limit of time at gap
0 and at once at gap 1e-3. The last columns show what the bounds before the solver are
worth: the layers that they leave undecided, the greedy assignment, and HiGHS on the whole program.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from _common import parser, say, start, table, version
from compress.compressors.allocation import Allocation, Budget, Choice, Item, allocate
from compress.compressors.allocation_bounds import greedy, lagrangian, undecided
from compress.compressors.allocation_forms import make_monotone
from compress.compressors.allocation_highs import solve
from compress.compressors.allocation_problem import number

CASES = [
    ("random", 420, (2, 4, 8)),
    ("random", 800, (2, 4, 8)),
    ("random", 1600, (2, 4, 8)),
    ("random", 3200, (2, 3, 4, 8)),
    ("hard", 420, (2, 4, 8)),
    ("hard", 1600, (2, 4, 8)),
    ("ties", 100, (2, 4, 8)),
    ("ties", 800, (2, 4, 8)),
]
# Weights of the layers of a U-Net with blocks of 640 and 1280 channels and text features of 2048.
SIZES = [640 * 640, 640 * 2048, 1280 * 1280, 1280 * 2048, 1280 * 5120, 1280 * 10240]
BUDGET_SHARE = 0.45  # of all layers at 8 bits: 3.6 bits on average
ROUNDS = 3
LIMIT_SECONDS = {"random": 60.0, "hard": 60.0, "ties": 2.0}


def network(kind: str, count: int, bits: tuple[int, ...], seed: int) -> list[Item]:
    """Return layers with a choice for each number of bits."""
    generator = np.random.default_rng(seed)
    noise = np.exp(generator.normal(0, 0.3, (count, len(bits))))
    losses = np.exp(generator.normal(-7, 1.5, count))[:, None] * 4.0 ** (2.0 - np.array(bits)) * noise
    sizes = 8 * generator.integers(1_000, 4_000_000, count)
    if kind == "hard":
        sizes, losses = generator.choice(SIZES, count), np.round(losses, 6)
    if kind == "ties":
        sizes = 16 * generator.integers(10**6, 10**9, count)
        losses = sizes[:, None] * (max(bits) - np.array(bits)) * 1e-12
    items = [
        Item(
            f"layer.{i}",
            tuple(
                Choice(f"w{b}", float(losses[i, j]), {"bytes": int(sizes[i]) * b // 8})
                for j, b in enumerate(bits)
            ),
        )
        for i in range(count)
    ]
    return make_monotone(items, "bytes")[0]


def fastest(action: Callable[[], Allocation]) -> Allocation:
    """Return the result of the fastest of a few runs."""
    return min((action() for _ in range(ROUNDS)), key=lambda allocation: allocation.seconds)


def row(kind: str, count: int, bits: tuple[int, ...], seed: int) -> list[str]:
    """Solve one case in every way and return its line of the table."""
    items = network(kind, count, bits, seed)
    largest = sum(max(choice.costs["bytes"] for choice in item.choices) for item in items)
    budget, limit = Budget("bytes", int(BUDGET_SHARE * largest) | 1), LIMIT_SECONDS[kind]
    exact = fastest(lambda: allocate(items, [budget], mip_rel_gap=0.0, time_limit=limit))
    loose = fastest(lambda: allocate(items, [budget], mip_rel_gap=1e-3, time_limit=limit))
    problem = number(items, [budget]).problem
    dual = lagrangian(problem)
    quick = greedy(problem, dual)
    assert quick is not None
    quick_loss = problem.loss(quick)
    undecided_items = sum(len(js) > 1 for js in undecided(problem, dual, quick_loss - problem.best))
    began = time.perf_counter()
    whole = solve(problem, problem.excess, mip_rel_gap=0.0, time_limit=limit)
    whole_seconds = time.perf_counter() - began
    spread = problem.worst - problem.best
    return [
        f"{kind} {count} x {len(bits)}",
        f"{exact.seconds:.2f}",
        f"{exact.gap_of_range:.0e} {exact.stopped}",
        f"{loose.seconds:.2f}",
        f"{loose.gap_of_range:.0e}",
        f"{loose.gap_of_loss:.0e}",
        f"{100 * exact.budgets[0].share:.3f} %",
        str(undecided_items),
        f"{(quick_loss - exact.loss) / spread:.0e}",
        f"{whole_seconds:.2f}" + ("" if whole.stopped == "optimal" else f" ({whole.stopped})"),
    ]


def main() -> None:
    """Solve all cases and print."""
    arguments: argparse.Namespace = parser(__doc__).parse_args()
    start("Bit allocation by integer program", arguments)
    say(f"scipy {version('scipy')} (HiGHS), one thread; the fastest of {ROUNDS} runs\n")
    cases = CASES[:2] + CASES[4:5] + CASES[6:7] if arguments.quick else CASES
    table(
        ["layers x choices", "s, gap 0", "gap of range", "s, gap 1e-3", "of range", "of loss", "budget used",
         "undecided", "greedy above, of range", "s, HiGHS on all"],
        [row(*case, arguments.seed) for case in cases],
    )  # fmt: skip


if __name__ == "__main__":
    main()
