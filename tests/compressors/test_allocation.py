"""The allocation is the best there is, keeps its budgets to the unit, and says how far it may be off."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from compress.compressors import allocation, allocation_highs
from compress.compressors.allocation import (
    Budget,
    Choice,
    InfeasibleBudget,
    Item,
    _settle_ties,
    allocate,
    feasible_interval,
)
from compress.compressors.allocation_bounds import greedy, lagrangian, undecided
from compress.compressors.allocation_forms import make_monotone
from compress.compressors.allocation_problem import number
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

BITS = (2, 4, 8)


def layer(name, losses, costs, group=None, key="bytes"):
    choices = [
        Choice(f"w{i}", loss, {key: cost}) for i, (loss, cost) in enumerate(zip(losses, costs, strict=True))
    ]
    return Item(name, tuple(choices), group)


def network(count, seed=0, bits=BITS):
    """Return layers of random sizes whose losses fall about four-fold per bit."""
    generator = np.random.default_rng(seed)
    sizes = 8 * generator.integers(1_000, 4_000_000, count)
    scales = np.exp(generator.normal(0, 2, count))
    losses = scales[:, None] * 4.0 ** -np.array(bits) * np.exp(generator.normal(0, 0.3, (count, len(bits))))
    losses = np.minimum.accumulate(losses, axis=1)
    return [
        layer(f"blocks.{i}", losses[i].tolist(), [int(sizes[i]) * b // 8 for b in bits]) for i in range(count)
    ]


def total(items, pick=max, key="bytes"):
    return sum(pick(choice.costs[key] for choice in item.choices) for item in items)


def moves(items, found):
    """Return the changes of one item that fit and lose less, or as much at a higher cost."""
    left, key = found.budgets[0].limit - found.budgets[0].used, found.budgets[0].name
    return [
        (item.name, other.label)
        for item in items
        for now in item.choices
        if now.label == found.choices[item.name]
        for other in item.choices
        for extra in [other.costs[key] - now.costs[key]]
        if extra <= left and (other.loss < now.loss or (other.loss == now.loss and extra > 0))
    ]


def best_of_all(problem):
    """Return the least loss of all permitted assignments, by trying every one; None if there is none."""
    losses, spent = np.zeros(1), np.zeros((1, len(problem.limits)), dtype=object)
    for row, costs in zip(problem.losses, problem.costs, strict=True):
        losses = np.add.outer(losses, np.array(row)).ravel()
        spent = (spent[:, None, :] + np.array(costs, dtype=object)[None]).reshape(len(losses), -1)
    allowed = ((spent <= problem.limits) & (spent >= problem.floors)).all(1)
    return float(losses[allowed].min()) if allowed.any() else None


def random_problem(seed):
    """Return up to 10 items of up to 3 choices under 1 to 3 budgets, of any magnitude and shape."""
    r = random.Random(seed)
    shape = r.choice(["free", "ties", "bits"])
    largest, budget_count = r.choice([10, 1000, 10**6, 10**12]), r.choice([1, 1, 1, 2, 3])
    items = []
    for i in range(r.randint(1, 10)):
        choice_count = r.choice([1, 2, 3, 3, 3])
        size = r.choice([3, 5, 8, 13]) if shape == "ties" else r.randint(1, largest)
        losses = [
            float(r.randint(0, 3)) if shape == "ties" else 10 ** r.uniform(-6, 0) for _ in range(choice_count)
        ]
        if shape != "free":
            losses.sort(reverse=True)
        choices = []
        for j, loss in enumerate(losses):
            costs = {f"b{k}": r.randint(0, largest) for k in range(budget_count)}
            if shape != "free":
                costs["b0"] = size * BITS[j]
            choices.append(Choice(str(j), loss, costs))
        items.append(Item(f"layer.{i}", tuple(choices), r.choice(["content", "quality"])))
    budgets = []
    for k in range(budget_count):
        groups = None if r.random() < 0.7 else (items[0].group,)
        covered = [item for item in items if groups is None or item.group in groups]
        low, high = (total(covered, pick, f"b{k}") for pick in (min, max))
        limit = int(low + r.uniform(0 if budget_count == 1 else 0.3, 1) * (high - low))
        budgets.append(
            Budget(f"b{k}", limit, groups=groups, at_least=int(0.9 * limit) if r.random() < 0.15 else 0)
        )
    return items, budgets


class TestOptimality:
    def test_equal_to_brute_force_on_200_random_problems(self):
        feasible = 0
        for seed in range(200):
            items, budgets = random_problem(seed)
            best = best_of_all(number(items, budgets).problem)
            if best is None:
                with pytest.raises(InfeasibleBudget):
                    allocate(items, budgets, mip_rel_gap=0)
                continue
            found = allocate(items, budgets, mip_rel_gap=0)
            feasible += 1
            assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-12), seed
            assert found.lower_bound <= best * (1 + 1e-9) + 1e-12, seed
            assert found.stopped == "optimal", seed
            assert all(use.used <= use.limit for use in found.budgets), seed
            if len(budgets) == 1 and not budgets[0].at_least and not budgets[0].groups:
                assert not moves(items, found), seed
        assert feasible >= 150

    def test_by_hand(self):
        items = [
            layer("a", [9, 4, 0], [2, 4, 8]),
            layer("b", [5, 1, 0], [2, 4, 8]),
            layer("c", [1, 0], [1, 3]),
        ]
        # 12 units: a at 8 leaves 4 for the others, a loss of 6; all at their second choice lose 5.
        assert allocate(items, [Budget("bytes", 12)], mip_rel_gap=0).choices == {
            "a": "w1",
            "b": "w1",
            "c": "w1",
        }
        assert allocate(items, [Budget("bytes", 13)], mip_rel_gap=0).choices == {
            "a": "w2",
            "b": "w1",
            "c": "w0",
        }

    @pytest.mark.parametrize("seed", range(3))
    def test_800_layers_are_solved_to_proven_optimality_in_two_seconds(self, seed):
        items = network(800, seed)
        began = time.process_time()  # the processor's time: other processes do not count
        found = allocate(items, [Budget("bytes", int(0.45 * total(items)))], mip_rel_gap=0)
        assert time.process_time() - began <= 2
        assert found.stopped == "optimal"
        assert found.gap_of_range <= 1e-12
        assert found.lower_bound <= found.loss
        assert found.budgets[0].share > 0.9999

    @pytest.mark.parametrize("share", [0.3, 0.45, 0.6])
    def test_many_layers_of_few_sizes_reach_the_gap_in_five_seconds(self, share):
        generator = np.random.default_rng(0)
        sizes = generator.choice([640 * 640, 640 * 2048, 1280 * 1280, 1280 * 2048, 1280 * 10240], 1600)
        scales = np.exp(generator.normal(-7, 1.3, 1600))
        losses = np.round(
            scales[:, None] * np.array([1, 0.2, 0.01]) * generator.uniform(0.5, 1.5, (1600, 3)), 5
        )
        items = [
            layer(f"l{i}", losses[i].tolist(), [int(sizes[i]) * b // 8 for b in BITS]) for i in range(1600)
        ]
        items, _ = make_monotone(items, "bytes")
        began = time.process_time()
        found = allocate(items, [Budget("bytes", int(share * total(items)))], mip_rel_gap=1e-3)
        assert time.process_time() - began <= 5
        assert 0 <= found.gap_of_range <= found.gap_of_loss <= 1e-3
        assert found.budgets[0].share >= 0.99

    def test_the_lagrangian_bound_alone_is_within_a_thousandth_of_the_range(self):
        items = network(800)
        problem = number(items, [Budget("bytes", int(0.4 * total(items)))]).problem
        dual = lagrangian(problem)
        known = greedy(problem, dual)
        assert 0 <= problem.loss(known) - (problem.best + dual.bound) <= 1e-3 * (problem.worst - problem.best)
        # and it leaves little for HiGHS to decide
        open_items = [
            row for row in undecided(problem, dual, problem.loss(known) - problem.best) if len(row) > 1
        ]
        assert 1 <= len(open_items) <= 200

    @pytest.mark.parametrize("budget_count", [1, 2, 3])
    def test_the_lagrangian_bound_is_that_of_the_linear_relaxation(self, budget_count):
        generator = np.random.default_rng(budget_count)
        items = [
            Item(
                f"l{i}",
                tuple(
                    Choice(
                        str(b),
                        float(loss),
                        {f"b{k}": int(generator.integers(1, 99)) * b for k in range(budget_count)},
                    )
                    for b, loss in zip(BITS, sorted(generator.uniform(0, 1, 3), reverse=True), strict=True)
                ),
            )
            for i in range(40)
        ]
        budgets = [Budget(f"b{k}", int(0.5 * total(items, key=f"b{k}"))) for k in range(budget_count)]
        problem = number(items, budgets).problem
        relaxed = linprog(
            [loss for row in problem.losses for loss in row],
            A_ub=np.array([[cost[k] for row in problem.costs for cost in row] for k in range(budget_count)]),
            b_ub=problem.limits,
            A_eq=np.kron(np.eye(40), np.ones((1, 3))),
            b_eq=np.ones(40),
        )
        assert problem.best + lagrangian(problem).bound == pytest.approx(relaxed.fun, rel=1e-6)

    def test_a_gap_that_is_allowed_is_kept_and_told(self):
        items = network(400)
        budget = Budget("bytes", int(0.45 * total(items)))
        best = allocate(items, [budget], mip_rel_gap=0)
        found = allocate(items, [budget], mip_rel_gap=1e-2)
        assert found.stopped == "gap"
        assert (found.certificate, found.found_by) == ("lagrangian", "greedy")
        assert 0 < found.gap_of_loss <= 1e-2
        assert found.lower_bound <= best.loss <= found.loss


class TestBudgets:
    def test_the_loss_never_grows_with_the_budget(self):
        items = network(40)
        low, high = total(items, min), total(items)
        losses = [
            allocate(items, [Budget("bytes", low + i * (high - low) // 12)], mip_rel_gap=0).loss
            for i in range(13)
        ]
        assert losses == sorted(losses, reverse=True)
        assert len(set(losses)) == 13

    def test_at_the_ends_everyone_gets_the_least_or_the_most(self):
        items = network(40)
        smallest = allocate(items, [Budget("bytes", total(items, min))])
        assert set(smallest.choices.values()) == {"w0"}
        assert smallest.loss == smallest.worst_loss == smallest.lower_bound
        for limit in (total(items), 10 * total(items)):
            largest = allocate(items, [Budget("bytes", limit)])
            assert set(largest.choices.values()) == {"w2"}
            assert largest.loss == largest.best_loss == largest.lower_bound
            assert largest.budgets[0].used == largest.budgets[0].largest == total(items)

    def test_one_byte_in_a_terabyte_counts(self):
        # The solver's tolerance is wider than what separates these choices.
        over = 0
        for seed in range(25):
            r = random.Random(seed)
            sizes = [r.randint(10**11, 10**12) for _ in range(r.randint(2, 6))]
            items = [
                layer(
                    f"l{i}",
                    [1.0, r.uniform(0.2, 0.7), 0.0, 0.9],
                    [0, size - r.randint(1, 9), size, size // 2],
                )
                for i, size in enumerate(sizes)
            ]
            budget = Budget("bytes", sum(sizes) - r.randint(1, 5))
            problem = number(items, [budget]).problem
            answer = allocation_highs.solve(problem, problem.excess, mip_rel_gap=0, time_limit=10)
            assert problem.permits(answer.assignment)
            assert problem.loss(answer.assignment) == pytest.approx(best_of_all(problem))
            result, free = allocation_highs._run_highs(problem, [], problem.excess, {})
            over += not problem.permits(allocation_highs._largest(problem, free, result.x))
        assert over > 0  # or HiGHS has become exact, and the cuts are no longer needed

    def test_what_is_left_is_spent_on_choices_that_are_as_good(self):
        items = [layer("a", [1, 0, 0], [2, 4, 8]), layer("b", [1, 0, 0], [2, 4, 8])]
        found = allocate(items, [Budget("bytes", 13)])
        assert found.choices == {"a": "w2", "b": "w1"}  # equal items: the first name gets more
        assert found.budgets[0].used == 12
        assert allocate(items, [Budget("bytes", 16)]).budgets[0].share == 1

    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_that_still_fits_would_be_better(self, seed):
        items = network(60, seed)
        found = allocate(items, [Budget("bytes", int(0.5 * total(items)))], mip_rel_gap=1e-2)
        assert not moves(items, found)
        assert found.budgets[0].share >= 0.99

    def test_budgets_of_groups_and_of_all(self):
        items = [replace(item, group="content" if i % 3 else "quality") for i, item in enumerate(network(60))]
        content = [item for item in items if item.group == "content"]
        budgets = [
            Budget("all", int(0.5 * total(items)), cost="bytes"),
            Budget("content only", int(0.3 * total(content)), cost="bytes", groups=("content",)),
        ]
        found = allocate(items, budgets, mip_rel_gap=0)
        chosen = {
            item.name: next(c for c in item.choices if c.label == found.choices[item.name]) for item in items
        }
        assert (
            found.budgets[0].used
            == sum(chosen[item.name].costs["bytes"] for item in items)
            <= budgets[0].limit
        )
        assert (
            found.budgets[1].used
            == sum(chosen[item.name].costs["bytes"] for item in content)
            <= budgets[1].limit
        )
        assert found.loss > allocate(items, budgets[:1], mip_rel_gap=0).loss
        assert found.stopped == "optimal"

    def test_a_band_is_kept_on_both_sides(self):
        # Without its lower end the dearest choice, which is worse, is not taken.
        items = [layer("a", [1, 0, 0.5], [2, 4, 8])]
        assert allocate(items, [Budget("bytes", 9)]).choices == {"a": "w1"}
        assert allocate(items, [Budget("bytes", 9, at_least=7)]).choices == {"a": "w2"}
        with pytest.raises(InfeasibleBudget, match="between 5 and 7 bytes; the next above costs 8"):
            allocate(items, [Budget("bytes", 7, at_least=5)])


class TestDeterminism:
    def test_no_order_changes_anything(self):
        items, r = network(120), random.Random(3)
        items += [replace(items[0], name=f"twin.{i}") for i in range(5)]
        # Two kinds of the same size and loss: the label decides.
        kinds = tuple(Choice(label, 0.5, {"bytes": 1000}) for label in ("nf4", "int4", "fp4"))
        items += [Item(f"either.{i}", kinds) for i in range(5)]
        budgets = [
            Budget("a", int(0.5 * total(items)), cost="bytes"),
            Budget("b", int(0.45 * total(items)), cost="bytes"),
        ]
        written = set()
        for _ in range(4):
            found = allocate(items, budgets)
            figures = {**found.to_json(), "seconds": 0, "budgets": sorted(u.name for u in found.budgets)}
            written.add(json.dumps(figures, sort_keys=True))
            assert list(found.choices) == [item.name for item in items]
            items = [
                replace(i, choices=tuple(r.sample(i.choices, len(i.choices))))
                for i in r.sample(items, len(items))
            ]
            budgets.reverse()
        assert len(written) == 1

    def test_equal_items_are_served_by_name(self):
        items = [layer(name, [3, 1, 0], [2, 4, 8]) for name in "dbca"]
        named = number(items, [Budget("bytes", 24)])
        assert _settle_ties(named, [0, 1, 2, 1]) == [2, 1, 1, 0]
        assert allocate(items, [Budget("bytes", 24)]).choices == {"a": "w2", "b": "w2", "c": "w1", "d": "w1"}


class TestLimits:
    def hard(self):
        """Loss proportional to what is saved, in even numbers under an odd limit: nothing but ties."""
        generator = np.random.default_rng(0)
        sizes = 2 * generator.integers(10**9, 10**12, 100)
        items = [
            layer(f"l{i}", [float(s) * (8 - b) * 1e-13 for b in BITS], [int(s) * b for b in BITS])
            for i, s in enumerate(sizes)
        ]
        return items, [Budget("bytes", int(0.45 * total(items)) | 1)]

    def test_a_limit_of_time_ends_it_with_bound_and_gap(self):
        items, budgets = self.hard()
        found = allocate(items, budgets, mip_rel_gap=0, time_limit=0.2)
        assert found.stopped == "limit"
        assert found.seconds < 3
        assert 0 < found.gap_of_loss < 1e-4
        assert found.budgets[0].used <= found.budgets[0].limit
        assert "stopped at the limit" in found.summary()

    def test_a_limit_of_nodes_gives_the_same_answer_twice(self):
        items, budgets = self.hard()
        first, second = (
            allocate(items, budgets, mip_rel_gap=0, time_limit=60, node_limit=20) for _ in range(2)
        )
        assert first.stopped == "limit"
        assert replace(first, seconds=0) == replace(second, seconds=0)

    def test_an_answer_of_highs_is_filled_up_and_its_ties_are_settled(self, monkeypatch):
        # The greedy answer takes `big`; any two of the three twins are better and leave 1 unit for `flat`.
        items = [layer("big", [7.7, 0], [0, 7]), layer("flat", [1, 1], [0, 1])]
        items += [layer(f"twin.{i}", [5, 0], [0, 5]) for i in range(3)]
        answer = allocation_highs.Answer([0, 0, 0, 1, 1], 13.7, "optimal")
        monkeypatch.setattr(allocation, "solve", lambda *_, **__: answer)
        found = allocate(items, [Budget("bytes", 11)], mip_rel_gap=0)
        assert found.found_by == "highs"
        assert found.choices == {"big": "w0", "flat": "w1", "twin.0": "w1", "twin.1": "w1", "twin.2": "w0"}
        assert (found.loss, found.budgets[0].used) == (13.7, 11)

    def test_without_an_answer_of_highs_the_greedy_one_stands(self, monkeypatch):
        items, budgets = network(50), [Budget("bytes", int(0.45 * total(network(50))))]
        best = allocate(items, budgets, mip_rel_gap=0)
        assert best.certificate == "highs"

        class Nothing:
            x, status, mip_dual_bound = None, 1, None

        monkeypatch.setattr(allocation_highs, "milp", lambda *_, **__: Nothing)
        found = allocate(items, budgets, mip_rel_gap=0)
        assert (found.found_by, found.certificate, found.stopped) == ("greedy", "lagrangian", "limit")
        assert found.lower_bound <= best.loss <= found.loss
        assert found.gap_of_range < 1e-2


PROBLEMS = st.lists(
    st.lists(st.tuples(st.floats(-10, 10, width=32), st.integers(0, 30)), min_size=1, max_size=3),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(PROBLEMS, st.integers(0, 150))
def test_any_problem_is_solved_or_refused(rows, limit):
    items = [
        layer(f"l{i}", [loss for loss, _ in row], [cost for _, cost in row]) for i, row in enumerate(rows)
    ]
    best = best_of_all(number(items, [Budget("bytes", limit)]).problem)
    interval = feasible_interval(items, [Budget("bytes", limit)])["bytes"]
    if best is None:
        assert limit < interval.smallest
        with pytest.raises(InfeasibleBudget):
            allocate(items, [Budget("bytes", limit)], mip_rel_gap=0)
        return
    found = allocate(items, [Budget("bytes", limit)], mip_rel_gap=0)
    use = found.budgets[0]
    assert interval.smallest <= use.used <= limit
    assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.best_loss <= found.lower_bound <= found.loss <= found.worst_loss
    assert json.loads(json.dumps(found.to_json()))["gap_of_range"] == found.gap_of_range


def run_fresh(program):
    # With this variable C does not buffer either, and a line could not come late.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_importing_it_loads_no_torch():
    program = "import sys; import compress.compressors.allocation_forms, compress.compressors.allocation; "
    assert run_fresh(program + "print('torch' in sys.modules)") == "False\n"


NOISE = """
import ctypes, os, sys
from compress.compressors import allocation_highs as highs
library = ctypes.CDLL(None)
print("before", flush=True)
library.printf(b"c before\\n")
try:
    with highs._silenced_stdout():
        library.printf(b"HiGHS debugging\\n")
        os.write(1, b"more of it\\n")
        raise ZeroDivisionError
except ZeroDivisionError:
    library.printf(b"c after\\n")
library.fflush(None)
print("after")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there the solver's line cannot be caught")
def test_standard_output_stays_the_callers():
    assert run_fresh(NOISE) == "before\nc before\nc after\nafter\n"


def test_nothing_is_lost_where_standard_output_is_closed():
    items = (
        "[Item(str(i), (Choice('a', 1 / (i + 2), {'b': 0}), Choice('z', 0, {'b': 7 + i}))) for i in range(9)]"
    )
    program = (
        "import os, sys; os.close(1); from compress.compressors.allocation import *; "
        f"sys.stderr.write(allocate({items}, [Budget('b', 31)], mip_rel_gap=0).stopped)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "optimal"
