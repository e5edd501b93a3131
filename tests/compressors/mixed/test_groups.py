"""Every layer is measured by one metric; what a recipe says wrongly is refused by name."""

import pytest
from compress.compressors.quantization.mixed.groups import MetricGroup, group_layers
from compress.errors import PlanError
from compress.recipes.allocation import GroupSettings

ROLES = {
    "blocks.0.attn1.to_q": "attention.q",
    "blocks.0.attn2.to_k": "cross.k",
    "blocks.0.ff.net.2": "ff.out",
    "conv_in": "conv",
    "blocks.1.attn2.to_out.0": "cross.out",
}


def rule(*layers, metric="sqnr_db"):
    return GroupSettings(layers=layers, metric=metric)


@pytest.mark.parametrize("family", ["pixart", "unet"])
def test_text_conditioned_images_have_the_papers_two_groups(family):
    assert group_layers(family, ROLES) == [
        MetricGroup(
            "content", "ssim", ("blocks.0.attn2.to_k", "blocks.0.ff.net.2", "blocks.1.attn2.to_out.0")
        ),
        MetricGroup("quality", "sqnr_db", ("blocks.0.attn1.to_q", "conv_in")),
    ]


@pytest.mark.parametrize("family", ["dit", "sd3", "llm"])
def test_other_families_have_one_group(family):
    assert group_layers(family, ROLES) == [MetricGroup("all", "sqnr_db", tuple(ROLES))]


def test_a_group_without_layers_is_left_out():
    assert [group.name for group in group_layers("unet", {"conv_in": "conv"})] == ["quality"]
    assert group_layers("dit", {}) == []


def test_a_recipe_makes_its_own_groups_and_the_rest_is_one_too():
    rules = {"text": rule("*.attn2.*", metric="ssim"), "ends": rule("conv_in")}
    assert group_layers("dit", ROLES, rules) == [
        MetricGroup("text", "ssim", ("blocks.0.attn2.to_k", "blocks.1.attn2.to_out.0")),
        MetricGroup("ends", "sqnr_db", ("conv_in",)),
        MetricGroup("rest", "sqnr_db", ("blocks.0.attn1.to_q", "blocks.0.ff.net.2")),
    ]


@pytest.mark.parametrize(
    ("family", "rules", "words"),
    [
        ("dit", {"a": rule("*.attn3.*", "conv_in")}, "groups.a: pattern '*.attn3.*' matches no layer"),
        ("dit", {"a": rule("conv_in"), "b": rule("conv*")}, "conv_in is in two groups, 'a' and 'b'"),
        ("llm", {"a": rule("*", metric="ssim")}, "groups.a: ssim compares images"),
        ("dit", {"rest": rule("conv_in")}, "groups.rest does not describe all other layers"),
    ],
)
def test_what_is_wrong_is_named(family, rules, words):
    with pytest.raises(PlanError) as error:
        group_layers(family, ROLES, rules)
    assert words in str(error.value)
    assert error.value.hint
