"""Slimming that cannot be, as a user meets it: exit code, place, hint, and nothing exported."""

from __future__ import annotations

import json
import subprocess
import sys

import compress
import pytest
from compress.errors import CompressError, PlanError, RecipeError, SourceError

from ..tiny_classifiers import save_classifier
from ..tiny_sam import save_tiny_sam
from ..tiny_scenes import write_scenes

STAGE = {"ratio": 0.5, "steps": 1, "choice_images": 1}


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return save_tiny_sam(tmp_path_factory.mktemp("sam") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("images") / "scenes", 12)


@pytest.fixture
def refused(tmp_path, sam, images):
    """Return `refused(**changes of a recipe) -> the error of a run`, which has written no result."""

    def run(stage=None, **parts) -> CompressError:
        recipe = {
            "model": str(sam),
            "calibration": {"images": str(images), "samples": 2},
            "stages": [{"slimsam": {**STAGE, **(stage or {})}}],
            "evaluate": {"fidelity": None},
            "export": {"path": str(tmp_path / "out")},
            **parts,
        }
        with pytest.raises(CompressError) as caught:
            compress.run(recipe, work_dir=tmp_path / "work")
        assert not (tmp_path / "out").exists()
        work = tmp_path / "work"
        assert not work.exists() or not list(work.rglob("*.safetensors"))
        assert caught.value.hint or isinstance(caught.value, RecipeError)  # which say what a key may be
        return caught.value

    return run


def _of(folder):
    return {"images": str(folder), "samples": 2}


def test_a_folder_without_images(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(calibration=_of(tmp_path / "empty"))
    assert isinstance(error, SourceError) and str(tmp_path / "empty") in error.message


def test_a_folder_of_what_cannot_be_read(refused, tmp_path):
    folder = write_scenes(tmp_path / "broken", 12, masks=False)
    for path in folder.iterdir():
        path.write_bytes(b"no image: " + path.name.encode())
    error = refused(calibration=_of(folder))
    assert isinstance(error, SourceError) and "read" in error.message and str(folder) in error.message


def test_a_folder_that_is_not_there_and_a_recipe_that_names_none(refused, tmp_path):
    gone = refused(calibration=_of(tmp_path / "gone"))
    assert isinstance(gone, SourceError) and "no such" in gone.message
    none = refused(calibration={"samples": 2})
    assert isinstance(none, SourceError) and "images" in none.hint


def test_too_few_images(refused, tmp_path):
    error = refused(calibration=_of(write_scenes(tmp_path / "two", 2)))
    assert isinstance(error, SourceError)


def test_no_noise(refused):
    error = refused({"sigma": 0})
    assert isinstance(error, RecipeError) and "slimsam" in str(error) and "sigma" in str(error)
    assert "without noise the gradient of every weight is 0" in error.message


@pytest.mark.parametrize("ratio", [0.95, 0.999])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_a_ratio_that_leaves_less_than_a_channel_per_head(refused, ratio, ranking):
    error = refused({"ratio": ratio, "ranking": ranking})
    assert isinstance(error, PlanError) and "slimsam" in error.message and "leaves" in error.message
    assert "ratio of at most" in error.hint


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.5])
def test_a_ratio_that_is_no_share(refused, ratio):
    error = refused({"ratio": ratio})
    assert isinstance(error, RecipeError) and "ratio" in str(error)


@pytest.mark.parametrize("format", ["dequantized", "torchao", "compressed-tensors"])
def test_layers_of_different_widths_without_a_manifest(refused, tmp_path, format):
    export = {"path": str(tmp_path / "out"), "format": format}
    error = refused({"ranking": "global"}, export=export)
    assert isinstance(error, PlanError) and format in error.message and "compress" in error.hint


def test_models_of_other_families(refused, tmp_path, tiny_dit):
    classifier = refused(model=str(save_classifier("ViTForImageClassification", tmp_path / "vit")))
    denoiser = refused(model=str(tiny_dit))
    for error in (classifier, denoiser):
        assert isinstance(error, CompressError) and "slimsam" in error.message
        assert "sam" in f"{error.message} {error.hint}".replace("slimsam", "")


@pytest.mark.parametrize("kind", ["sam_hq", "sam2", "edgetam"])
def test_relatives_of_the_model(refused, tmp_path, kind):
    folder = tmp_path / kind
    folder.mkdir()
    architecture = {"sam_hq": "SamHQModel", "sam2": "Sam2Model", "edgetam": "EdgeTamModel"}[kind]
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(bytes(8))
    error = refused(model=str(folder))
    assert isinstance(error, SourceError) and architecture in error.message


def test_a_quantized_model_and_a_stage_that_cannot_follow(refused):
    error = refused(stages=[{"slimsam": STAGE}, {"rtn": {}}])
    assert isinstance(error, CompressError) and "rtn" in error.message


@pytest.mark.slow
def test_the_command_line_says_it_in_two_lines(tmp_path, sam, images):
    recipe = {
        "model": str(sam), "calibration": _of(images), "stages": [{"slimsam": {**STAGE, "ratio": 0.99}}],
        "evaluate": {"fidelity": None}, "export": {"path": "out"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "compress", "run", "recipe.yaml"], cwd=tmp_path, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == PlanError.exit_code
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert error.startswith("error: ") and "slimsam" in error and hint.strip().startswith("hint: ")
    assert not (tmp_path / "out").exists()
