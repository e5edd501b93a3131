"""Ways to state an allocation, and the paper's formulas."""

import itertools
import math

import pytest
from compress.compressors.allocation import Budget, Choice, Item, allocate
from compress.compressors.allocation_forms import (
    LossChange,
    average_bits,
    group_means,
    make_monotone,
    mean_bits_band,
    share_choice,
)
from compress.errors import PlanError

BITS = (2, 4, 8)


def layer(name, losses, costs, group=None, key="bytes"):
    choices = [
        Choice(f"w{i}", loss, {key: cost}) for i, (loss, cost) in enumerate(zip(losses, costs, strict=True))
    ]
    return Item(name, tuple(choices), group)


def test_losses_are_made_monotone_and_the_changes_told():
    items = [layer("noisy", [3, 1, 2], [2, 4, 8]), layer("fine", [3, 2, 1], [2, 4, 8])]
    items.append(layer("two kinds of 4 bits", [3, 2, 1, 1.5], [2, 4, 4, 8]))
    changed, changes = make_monotone(items, "bytes")
    assert [[choice.loss for choice in item.choices] for item in changed] == [
        [3, 1, 1],
        [3, 2, 1],
        [3, 2, 1, 1],
    ]
    assert changes == [LossChange("noisy", "w2", 2, 1), LossChange("two kinds of 4 bits", "w3", 1.5, 1)]
    assert make_monotone(changed, "bytes") == (changed, [])
    with pytest.raises(PlanError, match="noisy: choice 'w0' has no cost 'macs'"):
        make_monotone(items, "macs")
    with pytest.raises(PlanError, match="a: the loss of choice 'w0' is nan"):
        make_monotone([layer("a", [math.nan], [1])], "bytes")


def test_layers_that_share_a_choice_count_together():
    qkv = [layer(name, [scale, scale / 4], [2, 4], "attn") for name, scale in (("q", 1), ("k", 2), ("v", 4))]
    shared = share_choice("qkv", qkv)
    assert [(choice.loss, choice.costs) for choice in shared.choices] == [
        (7, {"bytes": 6}),
        (1.75, {"bytes": 12}),
    ]
    assert shared.group == "attn"
    found = allocate([shared, layer("out", [1, 0.5], [2, 4])], [Budget("bytes", 15)])
    assert found.choices == {"qkv": "w1", "out": "w0"}
    assert found.layers == {"q": "w1", "k": "w1", "v": "w1", "out": "w0"}
    with pytest.raises(PlanError, match="qkv: q and v share a choice but have not the same ones"):
        share_choice("qkv", [*qkv[:2], layer("v", [1], [2], "attn")])
    with pytest.raises(PlanError, match="but not a group"):
        share_choice("qkv", [*qkv[:2], layer("v", [1, 0], [2, 4])])


def test_average_bits():
    assert average_bits({"a": 4, "b": 8}, {"a": 300, "b": 100}) == 5
    with pytest.raises(PlanError, match="b: has bits or a size"):
        average_bits({"a": 4}, {"a": 1, "b": 2})
    with pytest.raises(PlanError, match="no weights"):
        average_bits({"a": 4}, {"a": 0})


def test_the_papers_band_brings_the_average_within_two_hundredths():
    sizes = {f"l{i}": 1000 + 37 * i for i in range(60)}
    items = [
        layer(name, [4.0**-b * (1 + i % 7) for b in BITS], [size * b for b in BITS], key="bits")
        for i, (name, size) in enumerate(sizes.items())
    ]
    at_least, limit = mean_bits_band(4.0, sum(sizes.values()))
    assert (at_least, limit) == (math.ceil(3.98 * sum(sizes.values())), 4.02 * sum(sizes.values()) // 1)
    found = allocate(items, [Budget("bits", limit, at_least=at_least, unit="bits")])
    bits = {name: BITS[int(label[1:])] for name, label in found.choices.items()}
    assert average_bits(bits, sizes) == found.budgets[0].used / sum(sizes.values())
    assert abs(average_bits(bits, sizes) - 4) <= 0.02
    assert mean_bits_band(4.02, 100, 0) == (402, 402)  # not 401, as in binary fractions


@pytest.mark.parametrize(("k", "r"), [*itertools.product((0.46, 0.8, 1.0, 1.36), (2.2418, 1.206, 0.5))])
def test_the_means_of_two_groups_keep_the_mean(k, r):
    means = group_means(4.0, k, r)
    assert (r * means.content + means.quality) / (1 + r) == pytest.approx(4.0, abs=1e-9)
    assert means.content == pytest.approx(k * means.quality, abs=1e-9)
    inside = 4 <= means.quality <= 8 and 2 <= means.content <= 8
    assert (means.outside is None) == inside


def test_means_that_the_choices_cannot_have_say_why():
    assert group_means(4.0, 1.36, 2.2418).outside == "quality would average 3.203 bits, outside 4 to 8"
    with pytest.raises(PlanError, match="positive"):
        group_means(4.0, 0, 1)
