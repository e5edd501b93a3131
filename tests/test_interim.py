"""Models are measured between stages, and the figures are told again by a run that goes on."""

from __future__ import annotations

import compress
import pytest
import torch
from compress.evaluation.by_task import evaluator_for
from compress.interim import Interim
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.loader import load_recipe
from compress.recipes.schema import CalibrationSettings, EvaluateSettings, ModelRef
from PIL import Image

from .tiny_sam import save_tiny_sam
from .tiny_scenes import write_parts

PRUNE = {"isomorphic": {"ratios": {"width": 0.25}, "importance": "magnitude", "round_to": 4}}
EVALUATE = {"fidelity": {"samples": 8}, "quality": {"samples": 20}}


def _recipe(path, stages, **evaluate):
    return {
        "model": "builtin:vit",
        "calibration": {"samples": 8},
        "stages": stages,
        "evaluate": {**EVALUATE, **evaluate},
        "export": {"path": str(path), "overwrite": True},
    }


def _finetune(steps):
    return {"finetune": {"steps": steps, "batch_size": 8}}


def _interim(folder, stages, model="builtin:vit"):
    model = open_model(ModelRef(id=str(model)), progress=SilentProgress())
    settings = EvaluateSettings.model_validate(EVALUATE)
    evaluator = evaluator_for(model, settings, 0, CalibrationSettings())
    reference = evaluator.reference(model, folder / "references", SilentProgress())
    recipe = load_recipe(_recipe(folder / "out", stages)).recipe
    return model, Interim(evaluator, reference, recipe.stages, folder / "measured", SilentProgress())


def test_all_stages_that_change_a_classifier_but_the_last(tmp_path):
    model, interim = _interim(tmp_path, [PRUNE, _finetune(1), _finetune(2)])
    assert [interim.wanted(index) for index in range(3)] == [True, True, False]
    assert interim.kept(0, tmp_path / "one") == {}
    interim.measure(0, model, tmp_path / "one")
    kept = interim.kept(0, tmp_path / "one")["measured"]
    assert kept["accuracy"] == kept["accuracy_original"] > 0.5 and kept["sqnr_db"] == 200.0
    assert interim.kept(0, tmp_path / "other") == {}, "another stage has figures of its own"
    with torch.no_grad():
        model.module.classifier.weight.neg_()
    interim.measure(0, model, tmp_path / "one")
    assert interim.kept(0, tmp_path / "one")["measured"]["accuracy"] < 0.3
    interim.measure(2, model, tmp_path / "three")
    assert interim.kept(2, tmp_path / "three") == {}


def test_masks_are_held_against_those_of_the_original_between_stages(tmp_path):
    place = write_parts(tmp_path / "images", 3, 3)
    model = open_model(ModelRef(id=str(save_tiny_sam(tmp_path / "sam"))), progress=SilentProgress())
    settings = EvaluateSettings.model_validate({"fidelity": {"samples": 3}, "quality": {"samples": 2}})
    evaluator = evaluator_for(model, settings, 0, CalibrationSettings(images=place))
    reference = evaluator.reference(model, tmp_path / "references", SilentProgress())
    recipe = load_recipe(_recipe(tmp_path / "out", [PRUNE, _finetune(1)])).recipe
    interim = Interim(evaluator, reference, recipe.stages, tmp_path / "measured", SilentProgress())
    assert [interim.wanted(index) for index in range(2)] == [True, False]
    with torch.no_grad():
        model.module.vision_encoder.neck.conv2.weight.neg_()
    interim.measure(0, model, tmp_path / "one")
    kept = interim.kept(0, tmp_path / "one")["measured"]
    assert set(kept) == {"sqnr_db", "mask_agreement", "miou", "miou_original", "miou_drop"}
    assert kept["mask_agreement"] < 1 and kept["sqnr_db"] < 20
    assert interim.samples([tmp_path / "one"]) == {}


@pytest.mark.slow
def test_a_run_tells_accuracy_after_pruning_and_after_training(tmp_path):
    work = tmp_path / "work"
    report = compress.run(_recipe(tmp_path / "out", [PRUNE, _finetune(1)]), work_dir=work)
    first, second = report["stages"]
    figures = first["details"]["measured"]
    assert (
        0
        <= figures["accuracy"]
        < figures["accuracy_original"]
        == report["evaluation"]["metrics"]["accuracy_original"]
    )
    assert "measured" not in second["details"]
    # Other figures are asked for: finished stages are not done again, but measured again.
    stages, other = [PRUNE, _finetune(1)], {"fidelity": {"samples": 9}}
    again = compress.run(_recipe(tmp_path / "out", stages, **other), work_dir=work)
    assert all(stage["resumed"] for stage in again["stages"])
    measured = again["stages"][0]["details"]["measured"]
    assert measured["accuracy"] == figures["accuracy"] and measured["sqnr_db"] != figures["sqnr_db"]
    assert "measured" not in again["stages"][1]["details"]


def _denoiser(folder, stages, seed=0):
    model = open_model(ModelRef(id="builtin:dit"), progress=SilentProgress())
    settings = EvaluateSettings.model_validate(
        {"fidelity": {"samples": 2, "steps": 2}, "quality": {"samples": 10, "steps": 2}, "layers": False}
    )
    evaluator = evaluator_for(model, settings, seed, CalibrationSettings())
    reference = evaluator.reference(model, folder / "references", SilentProgress())
    recipe = load_recipe({"model": "builtin:dit", "stages": stages, "export": {"path": str(folder / "out")},
                          "calibration": {"data": {"generate": 8}}}).recipe  # fmt: skip
    return model, Interim(evaluator, reference, recipe.stages, folder / "measured", SilentProgress())


HALF = {"depth": {"by": "indices", "keep": [0, 2, 5, 7]}}


def test_samples_of_a_denoiser_are_kept_with_its_figures(tmp_path):
    distill = {"distill": {"steps": 2, "batch_size": 2}}
    model, interim = _denoiser(tmp_path, [HALF, distill, distill, {"rtn": {"weight_bits": 8}}])
    assert [interim.wanted(index) for index in range(4)] == [True, True, True, False]
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    assert interim.samples(folders) == {}
    interim.measure(0, model, folders[0])
    figures = interim.kept(0, folders[0])["measured"]
    assert figures["psnr_db"] == 200.0 and figures["fid"] == figures["fid_original"]
    original = interim.reference.images()["fidelity"]
    assert torch.equal(interim.samples(folders)["after depth"], original)
    with torch.no_grad():
        model.module.proj_out_2.weight.neg_()
    interim.measure(1, model, folders[1])
    interim.measure(2, model, folders[2])
    interim.measure(3, model, folders[3])
    found = interim.samples(folders)
    assert list(found) == ["after depth", "after distill 1", "after distill 2"]
    assert torch.equal(found["after depth"], original)
    assert not torch.equal(found["after distill 1"], original)
    assert interim.kept(1, folders[1])["measured"]["psnr_db"] < 30


@pytest.mark.slow
def test_a_run_draws_a_denoiser_between_its_stages_and_again_from_what_is_kept(tmp_path):
    recipe = {
        "model": "builtin:dit",
        "calibration": {"samples": 2, "steps": 2},
        "stages": [HALF, {"rtn": {"weight_bits": 8}}],
        "evaluate": {"fidelity": {"samples": 2, "steps": 2}},
        "export": {"path": str(tmp_path / "out"), "overwrite": True},
    }
    report = compress.run(recipe, work_dir=tmp_path / "work")
    assert "measured" in report["stages"][0]["details"] and "measured" not in report["stages"][1]["details"]
    assert report["stages"][0]["details"]["measured"]["psnr_db"] < 60
    first = (tmp_path / "out" / "samples.png").read_bytes()
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.height > 350, "three rows: one of the model between its stages"
    for path in (tmp_path / "work" / "measured").glob("between-*.safetensors"):
        path.unlink()
    fewer = compress.run(recipe, work_dir=tmp_path / "work")
    assert fewer["stages"][0]["resumed"]
    assert (tmp_path / "out" / "samples.png").read_bytes() == first
