"""Recipes that train a denoiser on something, on nothing, or on what does not fit."""

import numpy as np
import pytest
import torch
from compress import fitting_data
from compress.calibration.latent_files import fingerprint
from compress.errors import RecipeError, SourceError
from compress.fitting_data import stage_data
from compress.models.checkpoint import locate
from compress.preflight import check_calibration, check_stages
from compress.recipes.loader import load_recipe
from compress.recipes.schema import ModelRef
from PIL import Image
from safetensors.torch import save_file

PRUNED = {"isomorphic": {"importance": "magnitude", "ratios": {"ff": 0.25}}}
TRAINED = [PRUNED, {"distill": {"steps": 2}}]
PLAIN = [{"distill": {"steps": 2, "answers": 0, "features": 0}}]


@pytest.fixture
def check(tiny_dit, tmp_path):
    """Return `check(stages, **calibration)`: what a recipe for a tiny DiT is told."""

    def run(stages, model=tiny_dit, **calibration):
        recipe = {
            "model": str(model), "calibration": {"samples": 1, **calibration}, "stages": stages,
            "export": {"path": str(tmp_path / "out")},
        }  # fmt: skip
        loaded = load_recipe(recipe)
        checkpoint = locate(ModelRef(id=str(model)))
        check_stages(loaded, checkpoint)
        return loaded.recipe

    return run


@pytest.fixture
def latents(tmp_path):
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.zeros(3, 4, 8, 8), "labels": torch.zeros(3, dtype=torch.int64)}, path)
    return path


def test_a_training_needs_data_and_data_a_training(check):
    check(TRAINED, data={"generate": 10})
    with pytest.raises(RecipeError, match=r"stages\[1\]\.distill.*names no data to train on"):
        check(TRAINED)
    with pytest.raises(RecipeError, match=r"calibration\.data.*no stage trains the model"):
        check([{"rtn": {"weight_bits": 8}}], data={"generate": 10})
    check([{"rtn": {"weight_bits": 8}}], data=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "it names no data; write one of latents, images, generate"),
        ({"generate": 3, "latents": "x"}, "latents and generate exclude each other"),
        ({"latents": "x", "steps": 3}, "steps has no effect with latents"),
        ({"images": "x", "guidance_scale": 2}, "guidance_scale has no effect with images"),
        ({"latents": "x", "batch_size": 3}, "batch_size has no effect with latents"),
        ({"generate": 0}, "greater than or equal to 1|at least 1"),
    ],
)
def test_keys_that_have_no_effect_are_refused(check, data, message):
    with pytest.raises(RecipeError, match=message):
        check(TRAINED, data=data)


def test_data_are_held_against_the_model(check, latents, tmp_path):
    check(TRAINED, data={"latents": str(latents)})
    save_file(
        {"latents": torch.zeros(3, 4, 8, 4), "labels": torch.zeros(3, dtype=torch.int64)},
        tmp_path / "wide.safetensors",
    )
    with pytest.raises(SourceError, match=r"an item is \[4, 8, 4\], and .* takes \[4, 8, 8\]"):
        check(TRAINED, data={"latents": str(tmp_path / "wide.safetensors")})
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(SourceError, match="the images have no labels"):
        check(TRAINED, data={"images": str(tmp_path / "images")})


def test_a_text_model_does_not_learn_from_images(check, tiny_sd3, tmp_path):
    with pytest.raises(RecipeError, match=r"calibration\.data\.images.*no captions"):
        check(PLAIN, tiny_sd3, data={"images": str(tmp_path)})


def test_classifiers_have_no_use_for_latents(check, make_vit, latents):
    with pytest.raises(RecipeError, match=r"calibration\.data.*of use for denoisers"):
        check([{"finetune": {"steps": 1}}], make_vit(), data={"latents": str(latents)})


def test_paths_are_looked_up_beside_the_recipe(tiny_dit, latents, tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    text = (
        f"model: {tiny_dit}\ncalibration: {{data: {{latents: ../{latents.name}}}}}\n"
        "stages: [{distill: {steps: 1, answers: 0, features: 0}}]\nexport: {path: out}\n"
    )
    (folder / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tiny_dit)
    loaded = load_recipe(folder / "recipe.yaml")
    assert loaded.recipe.calibration.data.latents.samefile(latents)
    check_calibration(loaded)
    latents.unlink()
    with pytest.raises(SourceError, match="no such file or folder; calibration"):
        check_calibration(load_recipe(folder / "recipe.yaml"))


def test_the_key_of_a_stage_knows_its_data(check, latents, tiny_dit):
    def key(stages=TRAINED, index=1, **data):
        return stage_data(check(stages, data=data), tiny_dit, None).get(index)

    first = key(generate=3)
    assert first == key(generate=3) != key(generate=4) and first != key(generate=3, flip=False)
    of_file = key(latents=str(latents))
    again = latents.with_name("again.safetensors")
    save_file({"latents": torch.ones(3, 4, 8, 8), "labels": torch.zeros(3, dtype=torch.int64)}, again)
    assert of_file != key(latents=str(again)) != first
    quantized = [*TRAINED, {"rtn": {"weight_bits": 8}}]
    assert key(quantized, 0, generate=3) is None
    assert key(quantized, 2, generate=3) is None


def test_stages_that_train_on_the_same_data_read_it_once(check, latents, tiny_dit, monkeypatch):
    read = []

    def counted(parts):
        read.append(parts)
        return fingerprint(parts)

    monkeypatch.setattr(fitting_data, "fingerprint", counted)
    stages = [*TRAINED, *TRAINED[1:], {"rtn": {"weight_bits": 8}}]
    found = stage_data(check(stages, data={"latents": str(latents)}), tiny_dit, None)
    assert list(found) == [1, 2] and found[1] == found[2] and len(read) == 1


def test_a_model_is_no_teacher_of_itself(check, make_tiny, tiny_dit):
    data = {"generate": 3}
    alone = {"distill": {"steps": 2}}
    with pytest.raises(RecipeError, match="learns from the original, and no stage before it has changed"):
        check([alone], data=data)
    check(PLAIN, data=data)
    itself = [{"distill": {"steps": 2, "teacher": f"{tiny_dit}/../{tiny_dit.name}"}}]
    with pytest.raises(RecipeError, match=r"stages\[0\]\.distill\.teacher: is the model itself"):
        check(itself, data=data)
    check([PRUNED, *itself], data=data)
    teacher = make_tiny(seed=1, name="teacher")
    named = [{"distill": {"steps": 2, "teacher": str(teacher)}}]
    first = stage_data(check(named, data=data), tiny_dit, None)
    assert first == stage_data(check(named, data=data), tiny_dit, None) and list(first) == [0]
    weights = teacher / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert first[0] != stage_data(check(named, data=data), tiny_dit, None)[0]
