"""Keys and gates that mean nothing for a kind of model are refused, at their place."""

from __future__ import annotations

import pytest
from compress import pipeline
from compress.errors import PlanError, RecipeError, SourceError
from compress.fitting import check_kind, sample_notes
from compress.models.checkpoint import locate
from compress.recipes.loader import load_recipe

STORIES, DIT, VIT = "builtin:stories", "builtin:dit", "builtin:vit"
WIDTH = {"ratios": {"width": 0.5}}


def _recipe(model, **parts):
    stages = parts.pop("stages", [{"rtn": {"weight_bits": 8}}])
    return {"model": model, "stages": stages, "export": {"path": "out/x"}, **parts}


def _check(recipe):
    loaded = load_recipe(recipe)
    check_kind(loaded, locate(loaded.recipe.model, weights=False))


def _mixdq(**changes):
    return [{"mixdq": {"budget": {"mean_bits": 4}, **changes}}]


def test_one_sample_is_refused_where_bits_are_allocated():
    allocated = [*_mixdq(), {"vidit_q": {"weight_bits": 4, "bits": "mixdq"}}]
    for stage in allocated:
        with pytest.raises(
            RecipeError, match=r"calibration\.samples: 1 sample; bits are measured on one half"
        ):
            _check(_recipe(DIT, calibration={"samples": 1}, stages=[stage]))
        _check(_recipe(DIT, calibration={"samples": 2}, stages=[stage]))
    _check(_recipe(DIT, calibration={"samples": 1}))


def test_the_notes_tell_how_many_samples_are_measured_on():
    stages = [{"rtn": {"weight_bits": 8}}, *_mixdq()]
    few = load_recipe(_recipe(DIT, calibration={"samples": 15}, stages=stages)).recipe
    assert sample_notes(few, 0) == []
    (note,) = sample_notes(few, 1)
    assert note.startswith("of 15 calibration samples, 7 are measured on instead of 8")
    enough = load_recipe(_recipe(DIT, calibration={"samples": 16}, stages=stages)).recipe
    assert sample_notes(enough, 1) == []


@pytest.mark.parametrize(
    ("name", "message"), [("no.jsonl", "no such file"), ("", "is a folder, not a table")]
)
def test_a_named_table_must_be_there_before_any_work(tmp_path, name, message):
    stages = _mixdq(sensitivity={"table": str(tmp_path / name)})
    recipe = _recipe(DIT, stages=stages, export={"path": str(tmp_path / "out")})
    for begin in (pipeline.plan, lambda recipe: pipeline.run(recipe, work_dir=tmp_path / "work")):
        with pytest.raises(SourceError, match=message) as caught:
            begin(recipe)
        assert str(tmp_path / name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "parts", "message"),
    [
        (STORIES, {"calibration": {"steps": 10}}, r"calibration\.steps: is of use for denoisers"),
        (STORIES, {"calibration": {"guidance_scale": 1.0}}, r"calibration\.guidance_scale: is of use"),
        (STORIES, {"calibration": {"scheduler": "ddim"}}, r"calibration\.scheduler: is of use"),
        (STORIES, {"calibration": {"classes": [1]}}, r"calibration\.classes: is of use"),
        (STORIES, {"calibration": {"prompts": "prompts.txt"}}, r"calibration\.prompts: is of use"),
        (STORIES, {"calibration": {"length": 513}}, r"calibration\.length: 513 tokens; .* at most 512"),
        (STORIES, {"evaluate": {"fidelity": {"steps": 5}}}, r"evaluate\.fidelity\.steps: is of use"),
        (STORIES, {"evaluate": {"quality": {}}}, r"evaluate\.quality: judges images"),
        (STORIES, {"require": {"psnr_db": ">= 30"}}, r"require\.psnr_db: is not measured for a language"),
        (
            STORIES,
            {"require": {"fid": "<= 3"}, "evaluate": {"quality": {}}},
            r"evaluate\.quality: judges images",
        ),
        (STORIES, {"stages": [{"rtn": {"adaln_weight_bits": 8}}]}, r"rtn\.adaln_weight_bits: is of use"),
        (
            STORIES,
            {"stages": [{"vidit_q": {"weight_bits": 8, "timestep_ranges": [[0, 10]]}}]},
            r"vidit_q\.timestep_ranges: is of use",
        ),
        (
            STORIES,
            {"stages": [{"mixdq": {"budget": {"mean_bits": 4}, "sensitivity": {"steps": 3}}}]},
            r"mixdq\.sensitivity\.steps: is of use for denoisers",
        ),
        (
            STORIES,
            {
                "stages": [
                    {
                        "mixdq": {
                            "budget": {"mean_bits": 4},
                            "groups": {"all": {"layers": ["*"], "metric": "ssim"}},
                        }
                    }
                ]
            },
            r"mixdq\.groups\.all\.metric: ssim compares images",
        ),
        (
            STORIES,
            {
                "stages": [
                    {
                        "vidit_q": {
                            "bits": {"budget": {"mean_bits": 4}, "sensitivity": {"steps": 3}},
                        }
                    }
                ]
            },
            r"vidit_q\.bits\.sensitivity\.steps: is of use for denoisers",
        ),
        (DIT, {"calibration": {"text": "text.txt"}}, r"calibration\.text: is of use for language models"),
        (DIT, {"calibration": {"length": 64}}, r"calibration\.length: is of use for language models"),
        (DIT, {"require": {"perplexity": "<= 9"}}, r"require\.perplexity: is not measured for a denoiser"),
        (DIT, {"require": {"kl": "<= 9"}}, r"require\.kl: is not measured for a denoiser"),
        (DIT, {"require": {"top1_agreement": ">= 0.5"}}, r"require\.top1_agreement: is not measured"),
        (DIT, {"calibration": {"images": "photos"}}, r"calibration\.images: is of use for classifiers"),
        (DIT, {"calibration": {"strict": True}}, r"calibration\.strict: is of use for classifiers"),
        (
            DIT,
            {"stages": [{"isomorphic": {**WIDTH, "loss": "cross_entropy"}}]},
            r"isomorphic\.loss: cross_entropy is a loss of classifiers",
        ),
        (STORIES, {"calibration": {"images": "photos"}}, r"calibration\.images: is of use for classifiers"),
        (STORIES, {"require": {"top1_agreement": ">= 0.5"}}, r"require\.top1_agreement: is not measured"),
        (VIT, {"calibration": {"steps": 3}}, r"calibration\.steps: is of use for denoisers, and vit is a"),
        (VIT, {"calibration": {"classes": [1]}}, r"calibration\.classes: is of use for denoisers"),
        (VIT, {"calibration": {"text": "text.txt"}}, r"calibration\.text: is of use for language models"),
        (VIT, {"calibration": {"length": 64}}, r"calibration\.length: is of use for language models"),
        (
            VIT,
            {"evaluate": {"fidelity": {"steps": 5}}},
            r"evaluate\.fidelity\.steps: is of use for denoisers",
        ),
        (
            VIT,
            {"evaluate": {"quality": {"guidance_scale": 2.0}}},
            r"evaluate\.quality\.guidance_scale: is of",
        ),
        (VIT, {"require": {"psnr_db": ">= 30"}}, r"require\.psnr_db: is not measured for a classifier"),
        (VIT, {"require": {"perplexity": "<= 9"}}, r"require\.perplexity: is not measured for a classifier"),
        (
            VIT,
            {"stages": [{"isomorphic": {**WIDTH, "loss": "denoising"}}]},
            r"isomorphic\.loss: denoising is a loss of denoisers",
        ),
    ],
)
def test_what_is_of_no_use_is_refused(model, parts, message):
    with pytest.raises(RecipeError, match=message) as found:
        _check(_recipe(model, **parts))
    assert found.value.exit_code == 2


def test_the_place_in_the_file_is_told(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: builtin:stories\ncalibration:\n  samples: 2\n  steps: 3\n"
        "stages:\n  - rtn: {weight_bits: 8}\nexport: {path: out/x}\n"
    )
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:10: calibration\.steps"):
        pipeline.plan(path)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:4:10: calibration\.steps"):
        pipeline.run(path, work_dir=tmp_path / "work")


@pytest.mark.parametrize("model", [STORIES, DIT, VIT])
def test_a_resolved_recipe_fits_again(model):
    loaded = load_recipe(_recipe(model))
    _check(loaded.recipe.model_dump(mode="json"))


def test_a_language_model_without_a_text_is_refused_before_the_work(make_llm, tmp_path):
    folder = make_llm("LlamaForCausalLM")
    with pytest.raises(SourceError, match="a language model is measured on text") as found:
        _check(_recipe(str(folder), calibration={"length": 16}))
    assert "text: FILE.txt" in str(found.value.hint) and found.value.exit_code == 4
    (folder / "calibration.txt").write_text("a text")
    _check(_recipe(str(folder), calibration={"length": 16}))
    with pytest.raises(SourceError, match=r"nowhere\.txt: no such file"):
        pipeline.run(_recipe(str(folder), calibration={"text": "nowhere.txt"}), work_dir=tmp_path / "work")


def test_formats_of_another_library_are_refused_by_the_plan(tmp_path):
    recipe = _recipe(STORIES, export={"path": str(tmp_path / "x"), "format": "torchao"})
    with pytest.raises(PlanError, match="written as the loader of diffusers reads it"):
        pipeline.plan(recipe)
