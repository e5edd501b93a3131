"""Methods of other packages: found by their entry point, validated by their own settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from compress.errors import RecipeError
from compress.recipes import schema
from compress.recipes.loader import load_recipe
from compress.recipes.stages import StageSettings
from pydantic import Field


class OtherSettings(StageSettings):
    method = "other"
    phase = "prune"
    families = frozenset({"dit"})

    share: float = 0.5
    colour: str = Field("red", pattern="^(red|blue)$")


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    points = {
        "other": SimpleNamespace(name="other", load=lambda: SimpleNamespace(settings=OtherSettings)),
        "bare": SimpleNamespace(name="bare", load=lambda: object),
    }

    def entry_points(*, group, name=None):
        assert group == "compress.compressors"
        return [point for key, point in points.items() if name in (None, key)]

    monkeypatch.setattr(schema.metadata, "entry_points", entry_points)


def recipe(stage):
    return {"model": "m", "stages": [stage], "export": {"path": "o"}}


def test_a_method_of_another_package():
    assert load_recipe(recipe({"other": {"share": 0.25}})).recipe.stages[0].settings == OtherSettings(
        share=0.25
    )
    assert schema.method_names() == [*schema.STAGES, "bare", "other"]


def test_its_keys_are_checked_as_ours():
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe({"other": {"shar": 1.0}}))
    assert caught.value.message == "stages[0].other.shar: unknown key 'shar'"
    assert "'share'" in caught.value.hint


def test_a_method_without_settings_is_unknown():
    with pytest.raises(RecipeError, match="unknown method 'bare'"):
        load_recipe(recipe({"bare": {}}))


def test_a_pattern_of_another_package_is_told_as_it_is(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: m\nstages: [{other: {colour: green}}]\nexport: {path: o}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "stages[0].other.colour: 'green' is not text that matches ^(red|blue)$" in caught.value.message
