"""A classifier is measured between stages, and the figures are told again by a run that goes on."""

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
