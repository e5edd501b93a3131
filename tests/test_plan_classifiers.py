"""What the shipped recipes for classifiers promise can be planned from a config alone."""

import compress
import pytest
from compress.errors import SourceError
from compress.recipes.loader import load_recipe


@pytest.fixture
def deit(tmp_path, monkeypatch):
    """A folder with the config of DeiT-Base, and nothing else; no images anywhere."""
    from transformers import DeiTConfig

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    config = DeiTConfig(num_labels=1000, architectures=["DeiTForImageClassificationWithTeacher"])
    config.save_pretrained(tmp_path / "deit")
    return tmp_path / "deit"


@pytest.mark.slow
def test_the_published_setting_is_planned_from_a_config_without_images(deit):
    recipe = load_recipe("deit_base_4g", overrides=[f"model={deit}"])
    before, after = (compress.plan(recipe)["stages"][0][moment] for moment in ("before", "after"))
    assert before["parameters"] == pytest.approx(87.34e6, rel=1e-3)
    assert before["macs"] == pytest.approx(17.657e9, rel=1e-3)
    assert after["parameters"] == pytest.approx(20.69e6, rel=0.01)
    assert after["macs"] == pytest.approx(4.16e9, rel=0.02)  # the published count leaves a part out


def test_a_run_without_its_images_is_refused_before_anything_is_read(deit):
    recipe = load_recipe("deit_base_4g", overrides=[f"model={deit}"])
    with pytest.raises(SourceError, match="imagenet: no such file or folder"):
        compress.run(recipe)
    assert [path.name for path in deit.parent.iterdir()] == ["deit"]


def test_the_built_in_recipe_is_planned_within_its_gates():
    plan = compress.plan("vit_isomorphic")
    gates = load_recipe("vit_isomorphic").recipe.require
    before, after = (plan["stages"][0][moment] for moment in ("before", "after"))
    assert gates["macs"].holds(after["macs"]) and after["macs"] <= before["macs"] / 2
    assert gates["size_ratio"].holds(after["bytes"] / before["bytes"])
