"""What depth pruning makes of DiT-XL/2, from its config alone: the published parameters and operations."""

import json

import compress
import pytest
from compress.models.dit import DiTFamily
from compress.recipes.loader import load_recipe

DIT_XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}
POSITIONS = 256 * 1152
"""The paper's checkpoints hold the fixed embedding of positions as a parameter; diffusers computes it."""

# depth: (as diffusers stores it, copies once, as the paper counts it; multiply-accumulates, without products)
TABLE = {
    28: (749_826_464, 674_834_720, 675_129_632, 118.7e9, 114.44e9),
    19: (509_682_848, 459_688_352, 459_983_264, 80.5e9, 77.66e9),
    14: (376_269_728, 340_162_592, 340_457_504, 59.3e9, 57.23e9),
    7: (189_491_360, 172_826_528, 173_121_440, 29.7e9, 28.62e9),
}
GROUPS = {19: ["3:4", "3:4", "2:4", "3:4", "2:4", "3:4", "3:4"], 14: "1:2", 7: "1:4"}


@pytest.fixture
def xl(tmp_path):
    folder = tmp_path / "xl"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DIT_XL_2))
    return folder


@pytest.mark.parametrize("depth", sorted(GROUPS))
def test_parameters_and_operations_are_the_published_ones(depth, xl):
    groups = f"stages.0.tinyfusion.groups={json.dumps(GROUPS[depth])}"
    plan = compress.plan(
        load_recipe("dit_xl_tinyfusion_d14", overrides=[f"model={xl}", groups, "require={}"])
    )
    for moment, layers in (("before", 28), ("after", depth)):
        found, (stored, once, papers, macs, without) = plan["stages"][0][moment], TABLE[layers]
        assert (found["parameters_stored"], found["parameters"]) == (stored, once)
        assert found["parameters"] + POSITIONS == papers
        assert found["macs"] == pytest.approx(macs, rel=0.002)
        left = {**DIT_XL_2, "num_layers": layers}
        assert DiTFamily().macs(left, attention_products=False) == pytest.approx(without, rel=0.001)
    assert plan["stages"][1]["after"] == plan["stages"][0]["after"]  # recovery changes no size


def test_the_shipped_recipe_halves_dit_xl_within_its_gates(xl):
    recipe = load_recipe("dit_xl_tinyfusion_d14", overrides=[f"model={xl}"])
    before, after = (compress.plan(recipe)["stages"][0][moment] for moment in ("before", "after"))
    assert recipe.recipe.require["parameters"].holds(after["parameters"])
    assert recipe.recipe.require["macs"].holds(after["macs"])
    share = (after["parameters"] + POSITIONS) / (before["parameters"] + POSITIONS)
    assert share == pytest.approx(0.504, abs=0.0005)
