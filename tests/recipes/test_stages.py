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


ALLOCATED = [
    ("mixdq: null", "mixdq.budget: this key is required"),
    ("mixdq: {budget: 4.0}", "mixdq.budget: 4.0 is not a mapping"),
    ("mixdq: {budget: {}}", "mixdq.budget: the budget is empty; give mean_bits, bytes or ratio"),
    ("mixdq: {budget: {bytes: 1.5 XB}}", "mixdq.budget.bytes: '1.5 XB' is not a size"),
    ("mixdq: {budget: {bytes: 0}}", "mixdq.budget.bytes: 0 is not at least 1"),
    ("mixdq: {budget: {ratio: 1.1}}", "mixdq.budget.ratio: 1.1 is not at most 1"),
    ("mixdq: {budget: {mean_bits: 17}}", "mixdq.budget.mean_bits: 17 is not at most 16"),
    ("mixdq: {budget: {mean_bits: 4}, bits: [4, 5]}", "mixdq.bits[1]: 5 is not one of 2, 3, 4, 6, 8, 16"),
    ("mixdq: {budget: {mean_bits: 4}, bits: [4, 4]}", "mixdq.bits: 4 is there twice"),
    ("mixdq: {budget: {mean_bits: 4}, bits: [4]}", "mixdq: bits offers 4 alone: there is nothing to choose"),
    ("mixdq: {budget: {mean_bits: 4}, fixed: {a: 5}}", "mixdq.fixed.a: 5 is not one of"),
    ("mixdq: {budget: {mean_bits: 4}, weight_bits: 4}", "mixdq.weight_bits: unknown key 'weight_bits'"),
    (
        "mixdq: {budget: {mean_bits: 4}, activation_bits: [8, 16], activation_budget: {mean_bits: 7}}",
        "activation_budget.mean_bits: 7 bits cannot be kept or used; from 8 to 16 bits can be asked",
    ),
    (
        "mixdq: {budget: {mean_bits: 4}, activation_bits: [4, 8], activation_budget: {mean_bits: 8.5}}",
        "from 4 to 8 bits can be asked",
    ),
    (
        "mixdq: {budget: {mean_bits: 4}, activation_bits: [16], activation_scale: static}",
        "activation_scale: static has no effect",
    ),
    (
        "mixdq: {budget: {mean_bits: 4}, activation_bits: [16], activation_symmetric: true}",
        "activation_symmetric has no effect",
    ),
    (
        "vidit_q: {bits: mixdq, weight_bits: 4, activation_bits: 16, activation_scale: static}",
        "activation_scale: static has no effect",
    ),
    (
        "vidit_q: {bits: {budget: {mean_bits: 4}, activation_bits: [16]}, activation_symmetric: true}",
        "activation_symmetric has no effect",
    ),
    ("rtn: {activation_bits: 16, activation_symmetric: false}", "activation_symmetric has no effect"),
    ("mixdq: {budget: {mean_bits: 4}, activation_bits: [8, 16]}", "but nothing decides among them"),
    ("mixdq: {budget: {mean_bits: 4}, activation_budget: {protect: 0.1}}", "has nothing to decide"),
    (
        "mixdq: {budget: {mean_bits: 4}, activation_bits: [4, 8], activation_budget: {protect: 0.1}}",
        "protect needs activation_bits to be 16 and one other",
    ),
    (
        "mixdq: {budget: {mean_bits: 4}, groups: {x: {layers: [a], metric: psnr}}}",
        "mixdq.groups.x.metric: 'psnr' is not one of 'sqnr_db', 'ssim'",
    ),
    ("vidit_q: {bits: mixqd}", "vidit_q.bits: 'mixqd' is not 'mixdq'"),
    ("vidit_q: {bits: {budget: {mean_bit: 4}}}", "vidit_q.bits.budget.mean_bit: unknown key 'mean_bit'"),
    ("vidit_q: {bits: {budget: {mean_bits: 4}}, weight_bits: 3}", "weight_bits has no effect beside bits"),
    ("vidit_q: {adaln_weight_bits: null}", "adaln_weight_bits: null is for allocated bits"),
    ("rtn: {adaln_weight_bits: null}", "adaln_weight_bits: null is for allocated bits"),
]


@pytest.mark.parametrize(("stage", "message"), ALLOCATED)
def test_contradictions_of_an_allocation_name_their_key(tmp_path, stage, message):
    error = refusal(tmp_path, HEAD + f"stages: [{{{stage}}}]\n")
    assert message in str(error)
    assert error.line == 3


def test_near_names_inside_a_stage_are_suggested(tmp_path):
    error = refusal(
        tmp_path, HEAD + "stages: [{mixdq: {budget: {mean_bits: 4}, groups: {x: {layer: [a]}}}}]\n"
    )
    assert "did you mean 'layers'?" in str(error)


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("1500", 1500), ("800 KB", 800_000), ("1.5 MB", 1_500_000), ("2GB", 2 * 10**9)]
)
def test_bytes_with_units_are_decimal(tmp_path, text, size_bytes):
    stage = recipe_of(tmp_path, f"mixdq: {{budget: {{bytes: {text}}}}}")
    assert stage.settings.budget.bytes == size_bytes


def recipe_of(folder, stage):
    file = folder / "x.yaml"
    file.write_text(HEAD + f"stages: [{{{stage}}}]\n", encoding="utf-8")
    return load_recipe(file).recipe.stages[0]


@pytest.mark.parametrize(
    "stage",
    [
        "mixdq: {budget: {bytes: 1.5 MB}, fixed: {a.*: 4}, bits: [2, 4], keep: [b]}",
        "vidit_q: {bits: mixdq, weight_bits: 4, keep: [b]}",
        "vidit_q: {bits: {budget: {ratio: 0.5}, bits: [3, 8]}, adaln_weight_bits: null}",
    ],
)
def test_what_a_recipe_is_written_out_as_reads_the_same(tmp_path, stage):
    first = recipe_of(tmp_path, stage)
    again = load_recipe({"model": "m", "export": {"path": "o"}, "stages": [first.to_json()]})
    assert again.recipe.stages[0] == first


def test_the_word_mixdq_is_a_budget_of_weight_bits():
    allocation = ViditQSettings(bits="mixdq", weight_bits=3, activation_bits=6).allocation
    assert allocation.budget.mean_bits == 3.0
    assert allocation.activation_bits == (6,)
    assert ViditQSettings().allocation is None
