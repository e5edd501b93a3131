"""A training whose loss is no number ends with its step, says what to change, and a run goes on as told."""

import re

import compress
import pytest
import torch
from compress.errors import StageError
from safetensors.torch import load_file, save_file

from ..small_dits import Told, equal_embedders

SEARCH = {"groups": "1:2", "steps": 60, "batch_size": 4, "checkpoint_every": 1}
LEARN = {"steps": 60, "batch_size": 4, "checkpoint_every": 1, "warmup": 0.0}
WILD = {"lr": 10.0, "clip_norm": None}
HALF = {"depth": {"by": "indices", "keep": [0, 2]}}


@pytest.fixture
def denoiser(make_tiny):
    return equal_embedders(make_tiny(num_layers=4, name="four"))


@pytest.fixture
def classifier(make_vit, tmp_path):
    """A classifier and images for it."""
    pixels = torch.randint(
        256, (16, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    save_file({"pixels": pixels, "labels": torch.arange(16) % 10}, tmp_path / "images.safetensors")
    return make_vit()


@pytest.fixture
def run(tmp_path):
    """Return `run(model, *stages, **calibration)` -> (what a run raises or reports, what it told)."""

    def make(model, *stages, **calibration):
        told = Told()
        recipe = {
            "model": str(model),
            "calibration": calibration,
            "stages": list(stages),
            "evaluate": {"fidelity": None},
            "export": {"path": str(tmp_path / "out")},
        }
        try:
            return compress.run(recipe, work_dir=tmp_path / "work", progress=told), told
        except StageError as error:
            return error, told

    return make


def refused(error, method, lowered):
    """Check what is said, and return (step that diverged, step that a second run goes on after)."""
    assert isinstance(error, StageError) and error.exit_code == 5
    said = re.search(rf"{method}: the (loss|gradient) of step (\d+) of 60 is not finite", error.message)
    assert said, error.message
    assert error.hint.startswith(f"lower {lowered} or set clip_norm; with that the stage starts over")
    goes_on = re.search(r"Unchanged, it goes on after step (\d+)$", error.hint)
    return int(said[2]), int(goes_on[1]) if goes_on else 0


CASES = [
    pytest.param("tinyfusion", {**SEARCH, **WILD, "mode": "full"}, "lr (10)", id="search"),
    pytest.param("distill", {**LEARN, **WILD}, "lr (10)", id="distill"),
    pytest.param("finetune", {**LEARN, **WILD, "weight_decay": 1.0}, "lr (10)", id="finetune"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings", "lowered"), CASES)
def test_a_run_that_diverges_says_where_and_what_then(method, settings, lowered, request, run, tmp_path):
    if method == "finetune":
        model = request.getfixturevalue("classifier")
        calibration = {"images": str(tmp_path / "images.safetensors"), "samples": 4}
        before = []
    else:
        model = request.getfixturevalue("denoiser")
        data = {"generate": 8, "steps": 1}
        calibration = {"samples": 1, "steps": 1, "guidance_scale": 1.0, "data": data}
        before = [HALF] if method == "distill" else []
    error, _ = run(model, *before, {method: settings}, **calibration)
    step, kept = refused(error, method, lowered)
    assert kept == step - 1 > 0, "a state is kept after every step"
    assert not (tmp_path / "out").exists()
    [state] = (tmp_path / "work").rglob("training.safetensors")
    assert all(bool(torch.isfinite(item).all()) for item in load_file(state).values())

    again, told = run(model, *before, {method: settings}, **calibration)
    assert f"training goes on after step {kept} of 60" in told.notes
    assert refused(again, method, lowered) == (step, kept), "the same numbers come to the same end"

    if not before:
        return
    calm = {**settings, "lr": 1e-4, "clip_norm": 1.0, "steps": 2}
    report, told = run(model, *before, {method: calm}, **calibration)
    assert not any("goes on after step" in note for note in told.notes)
    assert [stage["resumed"] for stage in report["stages"]] == [True, False], "the stage before is used again"


def test_where_nothing_is_kept_it_says_so(denoiser, run):
    data = {"generate": 8, "steps": 1}
    calibration = {"samples": 1, "steps": 1, "guidance_scale": 1.0, "data": data}
    settings = {**SEARCH, **WILD, "mode": "full", "checkpoint_every": 200}
    error, _ = run(denoiser, {"tinyfusion": settings}, **calibration)
    assert error.hint.endswith("Unchanged, it starts over")
