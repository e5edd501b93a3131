"""What cannot be allocated is refused by name, with the values that would do."""

import math
from dataclasses import replace

import pytest
from compress.compressors import allocation
from compress.compressors.allocation import (
    Budget,
    Choice,
    InfeasibleBudget,
    Item,
    allocate,
    feasible_interval,
)
from compress.compressors.allocation_highs import Answer
from compress.errors import PlanError


def layer(name, losses, costs, group=None, key="bytes"):
    choices = [
        Choice(f"w{i}", loss, {key: cost}) for i, (loss, cost) in enumerate(zip(losses, costs, strict=True))
    ]
    return Item(name, tuple(choices), group)


def test_the_largest_of_use_is_the_dearest_of_the_best():
    items = [layer("a", [1, 0, 0, 2], [2, 4, 8, 16]), layer("b", [3], [5])]
    interval = feasible_interval(items, [Budget("bytes", 1)])["bytes"]
    assert (interval.smallest, interval.largest, interval.fixed) == (7, 13, 5)


class TestInfeasible:
    def test_below_the_minimum_the_feasible_interval_is_named(self):
        items = [layer("a", [1, 0], [1_000, 3_000]), layer("b", [1, 0], [500, 700])]
        with pytest.raises(InfeasibleBudget) as caught:
            allocate(items, [Budget("weights", 1_400, cost="bytes")])
        error = caught.value
        assert (error.budget, error.asked, error.smallest, error.largest) == ("weights", 1_400, 1_500, 3_700)
        assert "'weights': 1,400 bytes asked, but the smallest feasible is 1,500" in error.message
        assert "more than 3,700 is of no use" in error.message
        assert error.exit_code == 3
        assert allocate(items, [Budget("weights", 1_500, cost="bytes")]).budgets[0].used == 1_500

    def test_fixed_items_that_exceed_the_budget_are_named_with_their_share(self):
        items = [layer("embed", [0], [600]), layer("head", [0], [900]), layer("a", [1, 0], [10, 20])]
        with pytest.raises(
            InfeasibleBudget, match=r"2 fixed items alone take 1,500, 150.0 % of it \(head, embed\)"
        ):
            allocate(items, [Budget("bytes", 1_000)])
        assert feasible_interval(items, [Budget("bytes", 1)])["bytes"].fixed == 1_500

    def test_budgets_that_exclude_each_other_say_what_each_would_need(self):
        def item(name):
            return Item(
                name,
                (Choice("small", 1, {"bytes": 2, "time": 9}), Choice("fast", 0, {"bytes": 8, "time": 3})),
            )

        items, limits = [item("a"), item("b"), item("c")], {"bytes": 10, "time": 10}
        budgets = [Budget("bytes", limits["bytes"]), Budget("time", limits["time"], unit="ms")]
        with pytest.raises(InfeasibleBudget) as caught:
            allocate(items, budgets)
        assert "'bytes' 10 bytes asked, smallest with the others as they are 24" in caught.value.message
        assert "'time' 10 ms asked, smallest with the others as they are 27" in caught.value.message
        assert (caught.value.budget, caught.value.smallest) == ("bytes", 24)
        assert allocate(items, [Budget("bytes", 24), budgets[1]]).budgets[0].used == 24
        with pytest.raises(InfeasibleBudget):
            allocate(items, [Budget("bytes", 23), budgets[1]])

    def test_too_little_time_is_not_called_infeasible(self, monkeypatch):
        items = [layer("a", [1, 0], [10, 20]), layer("b", [1, 0], [10, 20])]
        monkeypatch.setattr(allocation, "greedy", lambda *_: None)
        assert allocate(items, [Budget("bytes", 30)]).budgets[0].used == 30
        monkeypatch.setattr(allocation, "solve", lambda *_, **__: Answer(None, -math.inf, "limit"))
        with pytest.raises(PlanError, match="in 7 s no assignment within the budgets was found") as caught:
            allocate(items, [Budget("bytes", 30)], time_limit=7)
        assert not isinstance(caught.value, InfeasibleBudget)

    def test_a_lower_end_that_cannot_be_reached(self):
        items = [layer("a", [1, 0], [10, 20])]
        with pytest.raises(InfeasibleBudget, match="all items at their dearest take 20"):
            allocate(items, [Budget("bytes", 50, at_least=30)])
        with pytest.raises(InfeasibleBudget, match="lower end 30 is above its limit 20"):
            allocate(items, [Budget("bytes", 20, at_least=30)])


@pytest.mark.parametrize(
    ("items", "budget", "message"),
    [
        ([layer("blocks.3", [1, math.nan], [1, 2])], {}, "blocks.3: the loss of choice 'w1' is nan"),
        ([layer("blocks.3", [math.inf, 1], [1, 2])], {}, "blocks.3: the loss of choice 'w0' is inf"),
        ([layer("blocks.3", [1e200, 1], [1, 2])], {}, "blocks.3: the loss of choice 'w0'"),
        ([Item("blocks.3", ())], {}, "blocks.3: it has no choices"),
        ([layer("a", [1], [1]), layer("a", [1], [1])], {}, "item 'a' is given twice"),
        ([Item("a", (Choice("x", 1, {"bytes": 1}),) * 2)], {}, "choice of a 'x' is given twice"),
        ([layer("a", [1], [-1])], {}, "choice 'w0' for budget 'bytes' is negative"),
        ([layer("a", [1], [1.5])], {}, "must be a whole number, not 1.5"),
        (
            [layer("a", [1], [1], key="macs")],
            {},
            "a: the cost of choice 'w0' for budget 'bytes' is not given",
        ),
        ([layer("a", [1], [1])], {"limit": 2.0}, "its limit must be a whole number, not 2.0"),
        ([layer("a", [1], [1])], {"groups": ("attention",)}, "'attention', which no item is in"),
        (
            [replace(layer("a", [1], [1]), members=("b",)), layer("b", [1], [1])],
            {},
            "layer 'b' is given twice",
        ),
        ([], {}, "no items"),
    ],
)
def test_bad_input_is_named(items, budget, message):
    with pytest.raises(PlanError) as caught:
        allocate(items, [Budget(**{"name": "bytes", "limit": 9, **budget})])
    assert message in caught.value.message


def test_no_budget_and_senseless_limits():
    with pytest.raises(PlanError, match="no budget"):
        allocate([layer("a", [1], [1])], [])
    for arguments in ({"mip_rel_gap": -1}, {"time_limit": 0}):
        with pytest.raises(ValueError, match="must"):
            allocate([layer("a", [1], [1])], [Budget("bytes", 1)], **arguments)
