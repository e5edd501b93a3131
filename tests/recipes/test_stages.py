"""Settings that contradict themselves are refused when the recipe is read, with their place."""

from __future__ import annotations

import pytest
from compress.errors import RecipeError
from compress.recipes.loader import load_recipe
from compress.recipes.stages import ViditQSettings

HEAD = "model: m\nexport: {path: o}\n"
STAGES = "stages: [{rtn: {}}]\n"


def refusal(folder, text):
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return caught.value


@pytest.mark.parametrize(
    ("ranges", "column", "message"),
    [
        ("[[0, 400], [700, 500]]", 49, "timestep_ranges[1]: the range 700 to 500 is empty"),
        ("[[0, 1001]]", 43, "timestep_ranges[0][1]: 1001 is not at most 1000"),
        ("[[-1, 5]]", 40, "timestep_ranges[0][0]: -1 is not at least 0"),
        ("[[500, 999], [0, 500]]", 21, "timestep_ranges: the ranges 0 to 500 and 500 to 999 overlap"),
        ("[[0, 999], [20, 30], [500, 600]]", 21, "the ranges 0 to 999 and 20 to 30 overlap"),
    ],
)
def test_timestep_ranges(tmp_path, ranges, column, message):
    error = refusal(tmp_path, HEAD + f"stages: [{{vidit_q: {{timestep_ranges: {ranges}}}}}]\n")
    assert message in str(error)
    assert (error.line, error.column) == (3, column)


def test_ranges_in_any_order_are_kept_as_written():
    ranges = ((501, 1000), (0, 500))
    assert ViditQSettings(timestep_ranges=ranges).timestep_ranges == ranges


@pytest.mark.parametrize("number", [".inf", ".nan"])
@pytest.mark.parametrize("place", ["calibration", "evaluate.fidelity", "evaluate.quality"])
def test_guidance_is_a_finite_number(tmp_path, place, number):
    section = f"{{guidance_scale: {number}}}"
    for part in reversed(place.split(".")[1:]):
        section = f"{{{part}: {section}}}"
    error = refusal(tmp_path, HEAD + STAGES + f"{place.split('.')[0]}: {section}\n")
    assert f"{place}.guidance_scale: " in str(error)
    assert "finite number" in str(error)
    assert error.line == 4
