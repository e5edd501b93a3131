"""Sensitivities become losses, and budgets become limits, exactly."""

import math

import pytest
from compress.calibration.sensitivity_table import Table
from compress.compressors.allocation import Choice, InfeasibleBudget, Item
from compress.compressors.quantization.mixed.budgets import check_budget, plan_assignment
from compress.compressors.quantization.mixed.problem import (
    activation_budget,
    activation_program,
    allocated_weights,
    mean_bits,
    rest_item,
    spread,
    stored_bytes,
    weight_budgets,
    weight_program,
)
from compress.compressors.quantization.mixed.sweep import points_of, solve
from compress.errors import PlanError, StageError


def table(*rows):
    return Table("0" * 64, {}, rows)


def losses(program):
    return {item.name: {choice.label: choice.loss for choice in item.choices} for item in program.items}


def test_power_takes_the_measured_losses_and_floating_point_loses_nothing(made):
    layers = [made.entry("a", bits=(2, 4, 16)), made.entry("b", bits=(4, 16), metric_group="content")]
    rows = table(
        made.weight_row("a", 2, 0.3), made.weight_row("a", 4, 0.02), made.weight_row("b", 4, 0.1, "ssim")
    )
    program = weight_program(layers, rows, "power")
    assert losses(program) == {"a": {"w2": 0.3, "w4": 0.02, "w16": 0.0}, "b": {"w4": 0.1, "w16": 0.0}}
    assert program.groups == {"content": "ssim", "all": "sqnr_db"}


def test_mixdq_adds_up_decibels_below_the_best(made):
    rows = table(*(made.weight_row("a", b, loss) for b, loss in ((2, 0.1), (4, 0.001), (8, 1e-5))))
    program = weight_program([made.entry("a")], rows, "mixdq")
    assert losses(program)["a"] == pytest.approx({"w2": 40.0, "w4": 20.0, "w8": 0.0})


def test_under_mixdq_floating_point_is_better_than_the_best_grid(made):
    rows = [made.weight_row("a", b, loss) for b, loss in ((2, 0.1), (4, 0.001), (8, 1e-5))]
    rows += [made.weight_row("b", b, loss, "ssim") for b, loss in ((2, 0.5), (8, 0.125))]
    layers = [made.entry("a", bits=(2, 4, 8, 16)), made.entry("b", bits=(2, 8, 16), metric_group="content")]
    found = losses(weight_program(layers, table(*rows), "mixdq"))
    above = 20 * math.log10(2) * 8
    assert found["a"] == pytest.approx({"w2": 40 + above, "w4": 20 + above, "w8": above, "w16": 0.0})
    assert found["b"] == pytest.approx({"w2": 0.5, "w8": 0.125, "w16": 0.0})


def test_several_groups_are_normalised_by_what_they_lose_at_the_fewest_bits(made):
    layers = [made.entry("a"), made.entry("b"), made.entry("c", metric_group="content")]
    rows = [made.weight_row("c", b, loss, "ssim") for b, loss in ((2, 0.5), (4, 0.25), (8, 0.125))]
    rows += [made.weight_row(n, b, 10.0**-b) for n in "ab" for b in (2, 4, 8)]
    program = weight_program(layers, table(*rows), "power")
    items = program.weighted({"all": 1.0, "content": 3.0})
    worst = {item.name: max(choice.loss for choice in item.choices) for item in items}
    assert worst == pytest.approx({"a": 0.5, "b": 0.5, "c": 3.0})
    by_label = {choice.label: choice.loss for choice in items[2].choices}
    assert by_label == pytest.approx({"w2": 3.0, "w4": 1.5, "w8": 0.75})


def test_more_bits_that_measure_worse_are_logged(made):
    rows = table(*(made.weight_row("a", b, loss) for b, loss in ((2, 0.1), (4, 0.2), (8, 0.01))))
    program = weight_program([made.entry("a")], rows, "power")
    assert losses(program)["a"] == {"w2": 0.1, "w4": 0.1, "w8": 0.01}
    assert [(c.item, c.label, c.measured, c.used) for c in program.changes] == [("a", "w4", 0.2, 0.1)]


def test_a_layer_with_one_choice_needs_no_measurement(made):
    program = weight_program([made.entry("a", bits=(8,)), made.entry("b", bits=(16,))], table(), "power")
    assert losses(program) == {"a": {"w8": 0.0}, "b": {"w16": 0.0}}
    assert program.groups == {}


def test_a_sensitivity_that_is_missing_or_no_number_is_named(made):
    layers = [made.entry("blocks.3.ff")]
    rows = [made.weight_row("blocks.3.ff", b, 0.1) for b in (2, 4)]
    with pytest.raises(StageError, match=r"blocks\.3\.ff: its sensitivity at w8 was not measured"):
        weight_program(layers, table(*rows), "power")
    rows.append(made.weight_row("blocks.3.ff", 8, math.nan))
    with pytest.raises(StageError, match=r"blocks\.3\.ff: its sensitivity at w8 is nan"):
        weight_program(layers, table(*rows), "power")


def test_budgets_are_whole_numbers_of_what_was_asked(made):
    layers = [made.entry("a", 1000 * 64), made.entry("b", 64, bits=(8,))]
    asked = made.settings({"mean_bits": 3.3, "bytes": "1.5 MB", "ratio": 0.35}).budget
    found = {budget.name: budget.limit for budget in weight_budgets(layers, asked, 1_000_001)}
    assert found == {"mean_bits": 211_200, "bytes": 1_500_000, "ratio": 350_000}


def test_tied_copies_are_one_item_and_all_get_its_bits(made):
    layers = [made.entry("a", members=("a", "a.copy")), made.entry("b")]
    rows = table(*(made.weight_row(n, b, 10.0**-b) for n in "ab" for b in (2, 4, 8)))
    program = weight_program(layers, rows, "power")
    assert [item.members for item in program.items] == [("a", "a.copy"), ("b",)]
    assert allocated_weights(layers) == 2048
    assert spread(layers, {"a": "w2", "b": "w8"}) == {"a": "w2", "a.copy": "w2", "b": "w8"}
    weights = spread(layers, {"a": "w2", "b": "w8"})
    assert mean_bits(layers, weights) == 5.0
    assert stored_bytes(layers, weights) == layers[0].costs["w2"] + layers[1].costs["w8"]


def test_activations_are_averaged_over_the_elements_of_their_inputs(made):
    layers = [made.entry(n, inputs=k, activations=(8, 16)) for n, k in (("a", 100), ("b", 300))]
    rows = table(made.activation_row("a", 8, 0.1), made.activation_row("b", 8, 0.2))
    program = activation_program(layers, rows, "power")
    budget = activation_budget(layers, 10.0)
    assert budget.limit == 4000
    point = points_of(program, "power", 1)[0]
    found = solve(program, Item("rest", (Choice("", 0.0, {budget.key: 0}),)), [budget], point)
    assert (found.choices["a"], found.choices["b"]) == ("a16", "a8")  # b in 16 bits would take 5600
    with pytest.raises(StageError, match="c: how many elements its input has is not known"):
        activation_program([made.entry("c", activations=(8, 16))], rows, "power")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"mean_bits": 1.9}, "1.9 bits is less than every layer takes at the fewest bits offered; from 2"),
        ({"mean_bits": 8.1}, "8.1 bits is more than every layer takes at the most bits offered; from 2 "),
        ({"bytes": 1100}, "1,100 bytes is less than every layer takes"),
        ({"bytes": 9_000}, "9,000 bytes is more than every layer takes"),
        ({"ratio": 0.1}, "0.1 (1,000 of 10,000 bytes) is less than every layer takes"),
        ({"ratio": 0.9}, "0.9 (9,000 of 10,000 bytes) is more than every layer takes"),
    ],
)
def test_a_budget_that_cannot_be_kept_or_used_is_refused_with_what_can(made, budget, words):
    layers = [made.entry("a"), made.entry("b")]  # 2 x (256 + 64) to 2 x (1024 + 64) bytes, and 1000
    with pytest.raises(PlanError) as error:
        check_budget(layers, made.settings(budget), 1000, 10_000)
    assert words in str(error.value)
    assert error.value.hint
    check_budget(layers, made.settings({"bytes": 1640}), 1000, 10_000)
    check_budget(layers, made.settings({"bytes": 3176}), 1000, 10_000)


def test_fixed_layers_that_exceed_the_budget_are_named(made):
    layers = [made.entry("a"), made.entry("blocks.9.big", 64 * 1024, bits=(8,))]
    with pytest.raises(PlanError) as error:
        check_budget(layers, made.settings({"bytes": 30_000}), 100, 10**6)
    assert "what is fixed takes 69,732 bytes by itself (blocks.9.big, all other tensors)" in str(error.value)


def test_nothing_to_choose_is_refused(made):
    with pytest.raises(PlanError, match="every layer has one choice of bits only"):
        check_budget([made.entry("a", bits=(8,))], made.settings({"mean_bits": 8}), 0, 10_000)
    with pytest.raises(PlanError, match="b: it has no choices"):
        check_budget([made.entry("a"), made.entry("b", bits=())], made.settings({"mean_bits": 4}), 0, 10_000)


def test_several_budgets_are_checked_one_by_one(made):
    layers = [made.entry("a"), made.entry("b", 64 * 640)]
    check_budget(layers, made.settings({"mean_bits": 7.9, "bytes": 14_000}), 0, 10**6)
    with pytest.raises(PlanError, match=r"budget\.bytes: 10,000 bytes is less than every layer takes"):
        check_budget(layers, made.settings({"mean_bits": 7.9, "bytes": 10_000}), 0, 10**6)


@pytest.mark.parametrize("sizes", [(0, 0), (100, 300)])
def test_an_average_of_inputs_that_cannot_be_kept_or_used_is_refused_in_mean_bits(made, sizes):
    layers = [
        made.entry("a", inputs=sizes[0], activations=(4, 8)),
        made.entry("b", inputs=sizes[1], activations=(8, 16)),
        made.entry("fixed", inputs=1, activations=(8,)),
    ]
    known = all(sizes)
    low, high = (7, 14) if known else (4, 16)

    def check(mean):
        group = {"layers": ["a"], "activation_bits": (4, 8)}
        check_budget(
            layers,
            made.settings(
                {"mean_bits": 4}, activation_bits=(8, 16), activation_budget={"mean_bits": mean},
                groups={"g": group},
            ),
            0,
            10_000,
        )  # fmt: skip

    check(low)
    check(high)
    for mean in (6.9, 14.1) if known else ():
        with pytest.raises(PlanError, match=f"activation_budget.mean_bits: {mean} bits .* from 7 to 14 bits"):
            check(mean)


def test_a_plan_has_an_assignment_that_uses_the_budget(made):
    layers, _ = made.network(40, bits=(2, 3, 4, 8))
    asked = made.settings({"bytes": 150_000}, bits=(2, 3, 4, 8))
    assignment = plan_assignment(layers, asked, 5_000, 10**6)
    used = 5_000 + stored_bytes(layers, assignment.weights)
    assert 0.99 * 150_000 <= used <= 150_000
    assert set(assignment.activations.values()) == {8}


def test_the_sweep_of_the_paper_splits_the_average_and_skips_what_does_not_fit(made):
    layers, rows = made.network(20, groups=("content", "quality"), metrics={"content": "ssim"})
    program = weight_program(layers, rows, "mixdq")
    budgets = weight_budgets(layers, made.settings({"mean_bits": 4.0}).budget, 10**6)
    sizes = {
        group: sum(layer.weights for layer in layers if layer.metric_group == group)
        for group in ("content", "quality")
    }
    solved = 0
    for point in points_of(program, "mixdq", 10):
        try:
            found = solve(program, rest_item(0), budgets, point)
        except InfeasibleBudget as error:
            assert "outside" in str(error)
            continue
        solved += 1
        assert found.budgets[0].used <= budgets[0].limit
        means = {
            group: sum(
                int(found.choices[layer.site.name][1:]) * layer.weights
                for layer in layers
                if layer.metric_group == group
            )
            / sizes[group]
            for group in sizes
        }
        quality = 4.0 * sum(sizes.values()) / (point.quotient * sizes["content"] + sizes["quality"])
        # Each group spends its part to within the step of one layer.
        assert means["quality"] <= quality + 1e-3
        assert means["content"] <= point.quotient * quality + 1e-3
        assert means["content"] > point.quotient * quality - 0.5
    assert solved >= 8


def test_weights_and_activations_are_swept_over_the_papers_own_ranges(made):
    layers, rows = made.network(4, groups=("content", "quality"), metrics={"content": "ssim"})
    program = weight_program(layers, rows, "mixdq")
    ranges = [
        [point.quotient for point in points_of(program, "mixdq", 7, activations=inputs)]
        for inputs in (False, True)
    ]
    assert [(min(found), max(found)) for found in ranges] == [(0.46, 1.36), (0.94, 1.09)]


def test_three_groups_have_no_paper_to_follow(made):
    layers, rows = made.network(9, groups=("a", "b", "c"))
    with pytest.raises(PlanError, match="between two groups at most, not a, b, c"):
        points_of(weight_program(layers, rows, "mixdq"), "mixdq", 5)
    points = points_of(weight_program(layers, rows, "power"), "power", 7)
    assert len(points) == 7
    assert len({tuple(point.shares.values()) for point in points}) == 7
