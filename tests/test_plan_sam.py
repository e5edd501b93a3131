"""What the shipped recipes for Segment Anything promise can be planned from a config alone."""

import compress
import pytest
from compress.errors import SourceError
from compress.recipes.loader import load_recipe

PUBLISHED = {
    # parameters of the uniform models, and of SlimSAM's table (which leaves attention products out)
    "sam_vit_b_slim50": (27_962_032, 152.2e9),
    "sam_vit_b_slim77": (9_723_784, 46.0e9),
}


@pytest.fixture
def sam_vit_b(tmp_path, monkeypatch):
    """A folder with the config of SAM-B, and nothing else; no images anywhere."""
    from transformers import SamConfig

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SA1B", raising=False)
    SamConfig(architectures=["SamModel"]).save_pretrained(tmp_path / "sam")
    return tmp_path / "sam"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings_are_planned_from_a_config_without_images(sam_vit_b, name):
    recipe = load_recipe(name, overrides=[f"model={sam_vit_b}"])
    stage = compress.plan(recipe)["stages"][0]
    parameters, encoder_macs = PUBLISHED[name]
    assert stage["before"]["parameters"] == 93_735_728
    assert stage["after"]["parameters"] == parameters
    assert encoder_macs < stage["after"]["macs"] < 1.05 * encoder_macs  # and the decoder
    for gate, value in (("parameters", parameters), ("macs", stage["after"]["macs"])):
        assert recipe.recipe.require[gate].holds(value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_real_recipes_have_the_schedule_of_the_paper(name):
    recipe = load_recipe(name).recipe
    (stage,) = recipe.stages
    settings = stage.settings
    ratio, epochs = {"sam_vit_b_slim50": (0.5, 20), "sam_vit_b_slim77": (0.77, 40)}[name]
    assert (settings.ratio, settings.epochs, settings.ranking) == (ratio, epochs, "uniform")
    assert (settings.batch_size, settings.parts, settings.lr) == (4, 4, 1e-4)
    assert (settings.sigma, settings.feature_weight, settings.feature_epochs) == (0.01, 0.5, 10)
    assert (settings.choice_images, recipe.calibration.samples, settings.patience) == (50, 1000, 4)


def test_a_run_without_its_images_is_refused_before_anything_is_read(sam_vit_b):
    recipe = load_recipe("sam_vit_b_slim50", overrides=[f"model={sam_vit_b}"])
    with pytest.raises(SourceError, match=r"sa_000000\.tar: no such file or folder"):
        compress.run(recipe)
    assert [path.name for path in sam_vit_b.parent.iterdir()] == ["sam"]


def test_the_built_in_recipe_is_planned_within_its_gates():
    plan, recipe = compress.plan("sam_slimsam"), load_recipe("sam_slimsam").recipe
    before, after = (plan["stages"][0][moment] for moment in ("before", "after"))
    assert recipe.require["size_ratio"].holds(after["bytes"] / before["bytes"])
    assert recipe.require["macs"].holds(after["macs"]) and after["macs"] < 0.4 * before["macs"]
