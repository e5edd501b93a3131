"""The best measured allocation within the budget is taken, and everything is told."""

import json
import math

import pytest
from compress.calibration.sensitivity_table import Table
from compress.compressors.quantization.mixed.decision import decide
from compress.compressors.quantization.mixed.problem import REST, stored_bytes
from compress.errors import PlanError, StageError
from compress.progress import SilentProgress

FIXED, ORIGINAL = 5_000, 400_000


def error_of(layers, rows, activation=0.0):
    """Return a score: the sum of the table's losses, and `activation` for every quantized input."""

    def score(assignment):
        weights = sum(
            rows.at("weight", layer.site.name, assignment.weights[layer.site.name]).loss for layer in layers
        )
        return weights + activation * sum(bits < 16 for bits in assignment.activations.values())

    return score


def decided(layers, rows, settings, score=None, **options):
    return decide(
        layers,
        rows,
        settings,
        fixed_bytes=FIXED,
        original_bytes=ORIGINAL,
        score=score or error_of(layers, rows),
        progress=SilentProgress(),
        **options,
    )


@pytest.mark.parametrize(
    "budget", [{"mean_bits": 4.0}, {"bytes": 100_000}, {"ratio": 0.3}, {"mean_bits": 5, "bytes": 100_000}]
)
def test_the_budget_is_kept_and_used(made, budget):
    layers, rows = made.network(40, bits=(2, 3, 4, 8))
    decision = decided(layers, rows, made.settings(budget, bits=(2, 3, 4, 8)))
    details, weights = decision.details, decision.assignment.weights
    used = details["used"]
    assert used["bytes"] == FIXED + stored_bytes(layers, weights)
    mean = sum(int(weights[x.site.name][1:]) * x.weights for x in layers) / sum(x.weights for x in layers)
    assert used["mean_bits"] == pytest.approx(mean, rel=1e-12)
    assert mean <= budget.get("mean_bits", 8)
    assert used["bytes"] <= min(budget.get("bytes", 10**9), ORIGINAL * budget.get("ratio", 1))
    assert 0.99 <= used["share"] <= 1
    assert details["bound"]["lower_bound"] <= details["bound"]["loss"]
    assert details["bound"]["certificate"] in ("lagrangian", "highs")
    assert details["bound"]["gap_of_range"] <= 1e-3
    assert REST in decision.allocation.choices
    assert REST not in weights
    json.dumps(details, allow_nan=False)


def test_averages_and_histogram_of_the_groups_are_those_of_the_layers(made):
    layers, rows = made.network(30, groups=("content", "quality"), metrics={"content": "ssim"})
    details = decided(layers, rows, made.settings({"mean_bits": 4.0})).details
    assert [group["name"] for group in details["groups"]] == ["content", "quality"]
    for group in details["groups"]:
        chosen = [row for row in details["layers"] if row["group"] == group["name"]]
        assert group["metric"] == ("ssim" if group["name"] == "content" else "sqnr_db")
        assert group["layers"] == len(chosen) == sum(group["histogram"].values())
        weights = sum(row["weights"] for row in chosen)
        assert group["weights"] == weights
        mean = sum(row["weights"] * row["weight_bits"] for row in chosen) / weights
        assert group["mean_bits"] == pytest.approx(mean, rel=1e-12)
    assert details["measured"]["predicted_weights_sqnr_db"] is None  # 1 - SSIM predicts no error power


def test_the_least_measured_error_is_taken_whatever_the_program_prefers(made):
    layers, rows = made.network(30, groups=("content", "quality"), metrics={"content": "ssim"})
    seen = []

    def score(assignment):
        seen.append(dict(assignment.weights))
        high = sum(
            x.weights
            for x in layers
            if x.metric_group == "content" and assignment.weights[x.site.name] == "w8"
        )
        return 1.0 / (1.0 + high)

    decision = decided(layers, rows, made.settings({"mean_bits": 4.0}, points=9), score)
    points = decision.details["points"]
    tried = [point for point in points if point["eligible"]]
    assert sum(point["for_this_budget"] for point in points) >= 4
    chosen = [point for point in points if point["chosen"]]
    assert len(chosen) == 1
    assert chosen[0]["sqnr_db"] == max(point["sqnr_db"] for point in tried)
    assert chosen[0]["mean_bits"] <= 4.0
    assert chosen[0]["label"].startswith("content x ")
    assert len({tuple(weights.values()) for weights in seen}) >= len(points)


@pytest.mark.parametrize(("objective", "label"), [("power", "all w4"), ("mixdq", "paper's objective")])
def test_equal_bits_that_measure_better_are_taken_but_under_the_papers_objective(made, objective, label):
    layers, rows = made.network(12)

    def score(assignment):
        return 0.001 if set(assignment.weights.values()) == {"w4"} else 0.1

    details = decided(layers, rows, made.settings({"mean_bits": 4.0}, objective=objective), score).details
    (chosen,) = (point for point in details["points"] if point["chosen"])
    assert (chosen["label"], details["chosen"]) == (label, label)
    assert details["used"]["bytes"] == chosen["bytes"]
    assert details["used"]["mean_bits"] == chosen["mean_bits"] <= 4.0
    assert details["bound"]["point"] != "all w4"
    assert details["bound"]["loss"] >= details["bound"]["lower_bound"]
    assert ("paper" in details["chosen_among"]) is (objective == "mixdq")


@pytest.mark.parametrize("budget", [{"mean_bits": 3.9}, {"mean_bits": 4.5, "bytes": 60_000}])
def test_what_exceeds_one_budget_is_not_taken_however_good(made, budget):
    layers, rows = made.network(12)

    def score(assignment):
        return 10.0 ** -(sum(int(assignment.weights[x.site.name][1:]) * x.weights for x in layers) ** 0.1)

    details = decided(layers, rows, made.settings(budget), score).details
    used = details["used"]
    assert used["mean_bits"] <= budget["mean_bits"]
    assert used["bytes"] <= budget.get("bytes", 10**9)
    assert any(point["sqnr_db"] > details["measured"]["weights_sqnr_db"] for point in details["points"])


def test_nothing_is_measured_twice_but_the_final_model(made):
    layers, rows = made.network(10)
    seen = []
    inner = error_of(layers, rows)

    def score(assignment):
        seen.append((tuple(assignment.weights.values()), tuple(assignment.activations.values())))
        return inner(assignment)

    decided(layers, rows, made.settings({"mean_bits": 4.0}), score)
    assert len(set(seen)) == len(seen)
    assert seen[-1][1] == (8,) * 10
    assert all(activations == (16,) * 10 for _, activations in seen[:-1])


def test_points_show_other_budgets_equal_bits_and_the_front(made):
    layers, rows = made.network(30, bits=(2, 3, 4, 8))
    points = decided(layers, rows, made.settings({"mean_bits": 4.0}, bits=(2, 3, 4, 8))).details["points"]
    labels = [point["label"] for point in points]
    assert {"all w2", "all w3", "all w4", "all w8", "least sum of powers"} <= set(labels)
    assert labels.count("other budget") >= 4
    front = [point for point in points if point["on_front"]]
    assert [point["sqnr_db"] for point in front] == sorted(point["sqnr_db"] for point in front)
    for point in points:
        beaten = any(
            other["bytes"] <= point["bytes"]
            and other["predicted_loss"] <= point["predicted_loss"]
            and (other["bytes"], other["predicted_loss"]) != (point["bytes"], point["predicted_loss"])
            for other in points
        )
        assert point["on_front"] is not beaten
        assert point["sqnr_db"] == pytest.approx(-10 * math.log10(point["predicted_loss"]), abs=1e-3)


def test_the_papers_objective_is_labelled_and_solves_group_by_group(made):
    layers, rows = made.network(30, groups=("content", "quality"), metrics={"content": "ssim"})
    details = decided(layers, rows, made.settings({"mean_bits": 4.0}, objective="mixdq", points=10)).details
    assert details["objective_label"] == "mixdq objective (paper)"
    tried = [point for point in details["points"] if point["for_this_budget"]]
    assert all(point["label"].startswith("paper's objective, content/quality ") for point in tried)
    assert details["used"]["mean_bits"] <= 4.0
    for reason in details["skipped"]:
        assert "outside" in reason


def test_a_split_that_no_point_can_keep_is_refused(made):
    layers, rows = made.network(20, groups=("content", "quality"), metrics={"content": "ssim"})
    with pytest.raises(PlanError, match="no split of the budget between the groups content and quality"):
        decided(layers, rows, made.settings({"mean_bits": 2.02}, objective="mixdq", points=2))


@pytest.mark.parametrize("objective", ["power", "mixdq"])
@pytest.mark.parametrize("groups", [("all",), ("content", "quality")])
def test_a_budget_that_turned_out_too_large_gives_all_the_most_bits(made, objective, groups):
    """Plans count transforms at their largest; when everything is measured, it is too late to refuse."""
    layers, rows = made.network(12, groups=groups, metrics={"content": "ssim"})
    decision = decided(layers, rows, made.settings({"bytes": 300_000}, objective=objective))
    assert set(decision.assignment.weights.values()) == {"w8"}
    used = decision.details["used"]
    assert used["bytes"] == FIXED + stored_bytes(layers, decision.assignment.weights) < 300_000
    assert used["share"] == pytest.approx(used["bytes"] / 300_000)


def test_layers_that_are_fixed_keep_their_bits_and_copies_follow(made):
    layers, rows = made.network(10)
    layers[3] = made.entry("fixed", 6400, bits=(8,), decided_by="fixed: fix*", activations=(8,))
    layers[4] = made.entry("blocks.4", layers[4].weights, members=("blocks.4", "copy"))
    inner = error_of([x for x in layers if x.site.name != "fixed"], rows)
    decision = decided(layers, rows, made.settings({"mean_bits": 3.0}), inner)
    weights = decision.assignment.weights
    assert weights["fixed"] == "w8"
    assert weights["copy"] == weights["blocks.4"]
    by_name = {row["name"]: row for row in decision.details["layers"]}
    assert by_name["fixed"]["decided_by"] == "fixed: fix*"
    assert by_name["copy"]["bytes"] == by_name["copy"]["weights"] == 0
    assert decision.details["used"]["mean_bits"] <= 3.0


ACTIVATIONS = {"bits": (2, 4, 8), "activation_bits": (8, 16)}


def with_activations(made, count=20):
    layers, rows = made.network(count)
    layers = [
        made.entry(x.site.name, x.weights, activations=(8, 16), inputs=64 * (1 + i % 3))
        for i, x in enumerate(layers)
    ]
    extra = [made.activation_row(x.site.name, 8, 1e-4 * (i + 1)) for i, x in enumerate(layers)]
    return layers, type(rows)(rows.key, {}, (*rows.rows, *extra))


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.15, 3), (0.101, 3), (0.0, 0), (1.0, 20)])
def test_the_worst_inputs_are_protected_a_share_by_count(made, share, count):
    layers, rows = with_activations(made)
    settings = made.settings({"mean_bits": 4.0}, **ACTIVATIONS, activation_budget={"protect": share})
    decision = decided(layers, rows, settings)
    floating = [name for name, bits in decision.assignment.activations.items() if bits == 16]
    assert floating == [x.site.name for x in layers[20 - count :]]
    assert decision.details["activations"].get("protected", []) == floating


@pytest.mark.parametrize("objective", ["power", "mixdq"])
def test_what_loses_most_is_left_in_floating_point_under_both_objectives(made, objective):
    layers = [made.entry(f"b.{i}", bits=(4, 8), inputs=256, activations=(8, 16)) for i in range(10)]
    rows = [made.weight_row(x.site.name, b, 0.1 * 4.0**-b) for x in layers for b in (4, 8)]
    rows += [made.activation_row(x.site.name, 8, 0.5 if x.site.name == "b.7" else 1e-5) for x in layers]
    settings = made.settings(
        {"mean_bits": 6}, bits=(4, 8), activation_bits=(8, 16), activation_budget={"protect": 0.1},
        objective=objective,
    )  # fmt: skip
    decision = decided(layers, Table("0" * 64, {}, tuple(rows)), settings, lambda _: 0.1)
    assert [name for name, bits in decision.assignment.activations.items() if bits == 16] == ["b.7"]
    assert decision.details["activations"]["protected"] == ["b.7"]


def test_inputs_are_averaged_by_elements(made):
    layers, rows = with_activations(made)
    settings = made.settings({"mean_bits": 4.0}, **ACTIVATIONS, activation_budget={"mean_bits": 11.5})
    decision = decided(layers, rows, settings, error_of(layers, rows, activation=1e-4))
    bits, total = decision.assignment.activations, sum(x.inputs for x in layers)
    mean = sum(bits[x.site.name] * x.inputs for x in layers) / total
    assert 11.3 < mean <= 11.5
    assert decision.details["activations"]["mean_bits"] == pytest.approx(mean)
    assert decision.details["activations"]["bound"]["stopped"] in ("optimal", "gap")


def test_b11_phases_are_never_compared(made):
    """Every allocation with quantized inputs measures worse than all without; one is taken nevertheless."""
    layers, rows = with_activations(made)
    phases = {"weights": [], "activations": []}
    inner = error_of(layers, rows)

    def score(assignment):
        quantized = any(bits < 16 for bits in assignment.activations.values())
        phases["activations" if quantized else "weights"].append(assignment)
        return inner(assignment) + (100.0 if quantized else 0.0)

    settings = made.settings({"mean_bits": 4.0}, **ACTIVATIONS, activation_budget={"mean_bits": 10})
    decision = decided(layers, rows, settings, score)
    assert set(decision.assignment.activations.values()) == {8, 16}
    best = min(phases["weights"], key=lambda a: inner(a) if a in _eligible(phases, layers) else math.inf)
    assert decision.assignment.weights == best.weights
    # With these weights alone: the second phase looks at no other ones.
    assert all(a.weights == best.weights for a in phases["activations"])
    assert decision.details["measured"]["sqnr_db"] == pytest.approx(-20.0, abs=0.1)
    assert decision.details["measured"]["weights_sqnr_db"] > 0


def _eligible(phases, layers):
    total = sum(x.weights for x in layers)
    return [
        a
        for a in phases["weights"]
        if sum(int(a.weights[x.site.name][1:]) * x.weights for x in layers) <= 4 * total
    ]


def test_an_input_of_a_layer_in_floating_point_is_so_too(made):
    layers, rows = made.network(8)
    layers[0] = made.entry("float", 640, bits=(16,), activations=(8,), decided_by="fixed: float")
    inner = error_of(layers[1:], rows)
    decision = decided(layers, rows, made.settings({"mean_bits": 4.0}), inner)
    assert decision.assignment.activations["float"] == 16
    assert decision.assignment.activations["blocks.1"] == 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_measured_error_that_is_none_is_refused(made, value):
    layers, rows = made.network(5)
    with pytest.raises(StageError, match="the model's error under the allocation 'least sum of powers' is"):
        decided(layers, rows, made.settings({"mean_bits": 4.0}), lambda _: value)


def test_the_same_input_gives_the_same_decision_in_any_order(made):
    layers, rows = made.network(40, seed=3)
    settings = made.settings({"mean_bits": 3.7})
    first = decided(layers, rows, settings)
    again = decided(layers, rows, settings)
    other = decided(layers[::-1], type(rows)(rows.key, {}, rows.rows[::-1]), settings)
    assert first.assignment.weights == again.assignment.weights == other.assignment.weights
    assert json.dumps(first.details) == json.dumps(again.details)
    assert first.details["bound"]["loss"] == other.details["bound"]["loss"]
