"""What depth pruning makes of DiT-XL/2, from its config alone: the published parameters and operations."""

import json

import compress
import pytest
from compress.models.dit import DiTFamily
from compress.recipes.loader import load_recipe

from ..dit_xl import CONFIG, FIGURES, POSITIONS, write_config

GROUPS = {19: ["3:4", "3:4", "2:4", "3:4", "2:4", "3:4", "3:4"], 14: "1:2", 7: "1:4"}


@pytest.fixture
def xl(tmp_path):
    return write_config(tmp_path / "xl")


@pytest.mark.parametrize("depth", sorted(GROUPS))
def test_parameters_and_operations_are_the_published_ones(depth, xl):
    groups = f"stages.0.tinyfusion.groups={json.dumps(GROUPS[depth])}"
    plan = compress.plan(
        load_recipe("dit_xl_tinyfusion_d14", overrides=[f"model={xl}", groups, "require={}"])
    )
    for moment, layers in (("before", 28), ("after", depth)):
        found, told = plan["stages"][0][moment], FIGURES[layers]
        assert (found["parameters_stored"], found["parameters"]) == (told.parameters_stored, told.parameters)
        assert found["parameters"] + POSITIONS == told.published
        assert found["macs"] == pytest.approx(told.macs, rel=0.002)
        left = {**CONFIG, "num_layers": layers}
        assert DiTFamily().macs(left, attention_products=False) == pytest.approx(told.linear_macs, rel=0.001)
    assert plan["stages"][1]["after"] == plan["stages"][0]["after"]  # recovery changes no size


def test_the_shipped_recipe_halves_dit_xl_within_its_gates(xl):
    recipe = load_recipe("dit_xl_tinyfusion_d14", overrides=[f"model={xl}"])
    before, after = (compress.plan(recipe)["stages"][0][moment] for moment in ("before", "after"))
    assert recipe.recipe.require["parameters"].holds(after["parameters"])
    assert recipe.recipe.require["macs"].holds(after["macs"])
    share = (after["parameters"] + POSITIONS) / (before["parameters"] + POSITIONS)
    assert share == pytest.approx(0.504, abs=0.0005)
