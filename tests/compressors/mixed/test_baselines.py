"""What the program is held against plays fair: the same bytes, nothing left unused by neglect."""

import random

import pytest
from compress.compressors.allocation import Budget, Choice, Item, allocate
from compress.compressors.quantization.mixed.baselines import at_random, by_weight_error, evenly, greedily
from compress.compressors.quantization.mixed.problem import stored_bytes, weight_program


@pytest.fixture
def problem(made):
    layers, rows = made.network(60, bits=(2, 3, 4, 8))
    items = weight_program(layers, rows, "power").items
    sizes = {bits: stored_bytes(layers, {x.site.name: f"w{bits}" for x in layers}) for bits in (2, 3, 4, 8)}
    return layers, items, sizes


def ways(items, limit, layers):
    errors = {x.site.name: {f"w{b}": 4.0**-b for b in (2, 3, 4, 8)} for x in layers}
    return {
        "even": evenly(items, limit),
        "greedy": greedily(items, limit),
        "random": at_random(items, limit, random.Random(0)),
        "weight error": by_weight_error(items, errors, limit),
    }


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.83, 1.0])
def test_every_way_keeps_the_budget_and_uses_it(problem, share):
    layers, items, sizes = problem
    limit = sizes[2] + int(share * (sizes[8] - sizes[2]))
    best = allocate(items, [Budget("bytes", limit)])
    losses = {(item.name, choice.label): choice.loss for item in items for choice in item.choices}
    for name, chosen in ways(items, limit, layers).items():
        assert chosen.keys() == {x.site.name for x in layers}, name
        assert 0.97 * limit <= stored_bytes(layers, chosen) <= limit, name
        assert sum(losses[pair] for pair in chosen.items()) >= best.loss * (1 - 1e-6), name


def test_equal_bits_where_they_fit_exactly(problem):
    layers, items, sizes = problem
    for bits, size in sizes.items():
        assert set(evenly(items, size).values()) == {f"w{bits}"}
    # One byte less: all but what does not fit any more.
    below = evenly(items, sizes[4] - 1)
    assert sorted(set(below.values())) == ["w3", "w4"]
    first = [x.site.name for x in layers if below[x.site.name] == "w4"]
    assert first[:10] == [x.site.name for x in layers][:10]


def test_greedy_takes_the_largest_gain_per_byte_first():
    def item(name, gain, cost):
        return Item(name, (Choice("w2", gain, {"bytes": 0}), Choice("w4", 0.0, {"bytes": cost})))

    items = [item("a", 6.0, 6), item("b", 5.0, 4), item("c", 4.0, 4)]
    assert greedily(items, 8) == {"a": "w2", "b": "w4", "c": "w4"}
    assert greedily(items, 7) == {"a": "w2", "b": "w4", "c": "w2"}
    assert greedily(items, 0) == {"a": "w2", "b": "w2", "c": "w2"}


def test_layers_with_one_choice_are_left_alone(made):
    layers, rows = made.network(5)
    layers[2] = made.entry("fixed", 640, bits=(8,))
    items = weight_program(layers, rows, "power").items
    limit = stored_bytes(layers, {x.site.name: "w8" for x in layers})
    for name, chosen in ways(items, limit - 100, layers).items():
        assert chosen["fixed"] == "w8", name


def test_random_draws_differ_and_repeat(problem):
    _, items, sizes = problem
    first, second, other = (at_random(items, sizes[4], random.Random(seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other
