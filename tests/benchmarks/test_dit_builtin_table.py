"""The table of methods is measured under the conditions of the shipped recipes."""

import importlib.util

import pytest
from compress.recipes.loader import load_recipe


@pytest.fixture
def bench(repository, monkeypatch):
    """The benchmark as a module."""
    folder = repository / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("dit_builtin_table", folder / "dit_builtin_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_conditions_are_the_shipped_recipes(bench):
    recipe = load_recipe("dit_w4a8").recipe
    calibration, evaluate = bench.conditions(quick=False)
    assert calibration == recipe.calibration
    assert (evaluate.fidelity, evaluate.quality) == (recipe.evaluate.fidelity, recipe.evaluate.quality)
    quick_calibration, quick_evaluate = bench.conditions(quick=True)
    assert quick_calibration.guidance_scale == recipe.calibration.guidance_scale
    assert quick_evaluate.fidelity.guidance_scale == recipe.evaluate.fidelity.guidance_scale
    assert quick_evaluate.quality is None


def test_the_faithful_row_is_the_faithful_recipe(bench):
    (stage,) = load_recipe("dit_w4a8_faithful").recipe.stages
    settings = stage.settings.model_dump()
    assert bench.FAITHFUL["act_exponent"] == 0.5
    assert {name: settings[name] for name in bench.FAITHFUL} == bench.FAITHFUL
