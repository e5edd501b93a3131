"""Groups of layers: every module belongs to exactly one, by its number."""

from __future__ import annotations

import pytest
from compress.compressors.pruning.experts.layer_groups import assign, layer_groups
from compress.errors import PlanError


def modules(layers):
    return [f"model.layers.{layer}.mlp" for layer in layers]


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        (range(8), 4, ["layers.0-1", "layers.2-3", "layers.4-5", "layers.6-7"]),
        (range(7), 3, ["layers.0-2", "layers.3-4", "layers.5-6"]),
        (range(3), "per_layer", ["layers.0", "layers.1", "layers.2"]),
        (range(5), 1, ["layers.0-4"]),
        ([9, 1, 5, 3], 2, ["layers.1-3", "layers.5-9"]),  # the layers between have no experts
    ],
)
def test_layers_are_dealt_out_by_depth(layers, groups, expected):
    found = layer_groups(layers, groups)
    assert [group.name for group in found] == expected
    assert [layer for group in found for layer in group.layers] == sorted(layers)


def test_mixtral_has_four_groups_of_eight_layers():
    assert [len(group.layers) for group in layer_groups(range(32), 4)] == [8] * 4


@pytest.mark.parametrize("groups", [1, 4, 5, "per_layer"])
@pytest.mark.parametrize("layers", [range(32), range(1, 27), [1, 3, 10, 11, 12]])
def test_every_layer_matches_exactly_its_own_group(layers, groups):
    found = layer_groups(layers, groups)
    places = assign(found, modules(layers))
    assert len(places) == len(list(layers))
    for layer, name in zip(layers, modules(layers), strict=True):
        holding = [place for place, group in enumerate(found) if layer in group.layers]
        assert holding == [places[name]]
    assert set(places.values()) == set(range(len(found)))  # no layer falls into one common group


def test_a_number_inside_another_is_another_layer():
    places = assign(layer_groups([1, 11, 111], "per_layer"), modules([1, 11, 111]))
    assert list(places.values()) == [0, 1, 2]


@pytest.mark.parametrize(
    "name", ["model.layer.3.mlp", "model.layers.9.mlp", "model.mylayers.3.mlp", "model.norm", "layers.3x.mlp"]
)
def test_a_name_that_matches_no_group_is_refused(name):
    with pytest.raises(PlanError, match="no group of layers holds it") as caught:
        assign(layer_groups(range(8), 4), [*modules(range(8)), name])
    assert name in str(caught.value)


def test_a_layer_without_a_module_is_refused():
    with pytest.raises(PlanError, match="no module of the model is in layer 7"):
        assign(layer_groups(range(8), 4), modules(range(7)))


@pytest.mark.parametrize(
    ("layers", "groups", "message"),
    [(range(3), 4, "4 groups, but 3 layers"), ([], "per_layer", "no layer"), ([], 1, "no layer")],
)
def test_more_groups_than_layers_are_refused(layers, groups, message):
    with pytest.raises(PlanError, match=message):
        layer_groups(layers, groups)
