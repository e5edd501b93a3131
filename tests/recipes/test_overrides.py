"""`--set` and its short forms: applied before validation, and named as the place of their errors."""

from __future__ import annotations

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe

TEXT = """\
model: {id: builtin:dit, revision: abc, dtype: float32, subfolder: transformer}
stages:
  - vidit_q: {weight_bits: 4}
  - rtn:
export: {path: out/x}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("key", ["stages.0.vidit_q.weight_bits", "stages[0].vidit_q.weight_bits"])
def test_both_ways_to_write_a_position(file, key):
    assert load_recipe(file, overrides=[f"{key}=8"]).recipe.stages[0].settings.weight_bits == 8


def test_sections_that_are_absent_come_into_being(file):
    overrides = [
        "evaluate.quality.samples=100",
        "require.size_ratio=<= 0.4",
        "require.sqnr_db=>= 12",
        "stages.1.rtn.keep=[a, b.*]",
        "calibration={samples: 3, steps: 2}",
        "evaluate.fidelity.samples=2",
    ]
    recipe = load_recipe(file, overrides=overrides).recipe
    assert recipe.evaluate.quality.samples == 100 and recipe.evaluate.fidelity.samples == 2
    assert str(recipe.require["size_ratio"]) == "<= 0.4" and str(recipe.require["sqnr_db"]) == ">= 12"
    assert recipe.stages[1].settings.keep == ("a", "b.*")
    assert (recipe.calibration.samples, recipe.calibration.steps) == (3, 2)


def test_the_last_one_wins(file):
    assert load_recipe(file, overrides=["seed=1", "seed=2"]).recipe.seed == 2
    assert load_recipe(file, overrides=["seed=1"], seed=3).recipe.seed == 3


def test_a_model_written_as_text_can_get_a_dtype(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("model: builtin:dit\nstages: [{rtn: }]\nexport: {path: o}\n")
    recipe = load_recipe(path, overrides=["model.dtype=float16"]).recipe
    assert (recipe.model.id, recipe.model.dtype) == ("builtin:dit", "float16")


def test_short_forms(file):
    recipe = load_recipe(file, model="org/other", output="out/y", seed=5, device="cuda:1").recipe
    assert recipe.model.id == "org/other" and recipe.model.dtype == "float32"
    assert recipe.model.revision is None and recipe.model.subfolder is None  # they belonged to the old one
    assert (str(recipe.export[0].path), recipe.seed, recipe.device) == ("out/y", 5, "cuda:1")


def test_the_text_of_an_overridden_recipe_reproduces_it(file, tmp_path):
    loaded = load_recipe(file, overrides=["stages.0.vidit_q.weight_bits=8"], seed=3)
    assert "--set stages.0.vidit_q.weight_bits=8" in loaded.text and "--seed 3" in loaded.text
    again = tmp_path / "again.yaml"
    again.write_text(loaded.text)
    assert load_recipe(again).recipe == loaded.recipe


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        (
            "stages.0.vidit_q.weight_bits=5",
            "stages[0].vidit_q.weight_bits: 5 is not one of 2, 3, 4, 6, 8",
            None,
        ),
        ("stages.0.vidit_q.weigth_bits=8", "unknown key 'weigth_bits'", "did you mean 'weight_bits'?"),
        ("stages.0.vidt_q.weight_bits=8", "stages[0] is vidit_q, not vidt_q", "stages[0].vidit_q"),
        ("stages.2.rtn.weight_bits=8", "there is no stages[2]: the list has length 2", "from 0"),
        ("stages.rtn.weight_bits=8", "stages is a list: 'rtn' is not a position", "stages[0]"),
        ("evalute.quality.samples=8", "evalute: unknown key 'evalute'", "'evaluate'"),
        ("stages.0.vidit_q.weight_bits.x=8", "weight_bits is 4, so it has no key 'x' to set", None),
        ("model.0=8", "model is a mapping", None),
        ("seed=x", "seed: 'x' is not a whole number", None),
        ("seed", "an override needs a value", "key.path=value"),
        ("=3", "the key before = is missing", None),
        ("a..b=3", "'a..b' is not a path of keys", None),
        ("export.path=", "export.path: null is not text", None),
    ],
)
def test_errors_name_the_option(file, override, message, hint):
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides=[override])
    assert caught.value.message.startswith(f"--set {override}: ")
    assert message in caught.value.message
    assert hint is None or hint in (caught.value.hint or "")


def test_errors_of_short_forms_name_them(file):
    for option, message in (({"seed": -1}, "--seed -1: seed"), ({"device": "gpu"}, "--device gpu: device")):
        with pytest.raises(RecipeError) as caught:
            load_recipe(file, **option)
        assert caught.value.message.startswith(message)
