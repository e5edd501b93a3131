"""The hash of what a stage trains on knows the VAE that encodes the images."""

import shutil

import numpy as np
import pytest
from compress.fitting_data import stage_data
from compress.recipes.loader import load_recipe
from PIL import Image

STAGES = [{"distill": {"steps": 2, "answers": 0, "features": 0}}]


@pytest.fixture
def key(tiny_dit, tmp_path):
    """Return `key(revision=None) -> hash of the data of a stage` that trains a DiT on images."""
    shutil.copytree(tiny_dit, tmp_path / "pipeline" / "transformer")
    (tmp_path / "images" / "3").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "3" / "a.png")
    folder = tmp_path / "pipeline" / "transformer"
    recipe = load_recipe(
        {"model": str(folder), "calibration": {"data": {"images": str(tmp_path / "images")}},
         "stages": STAGES, "export": {"path": str(tmp_path / "out")}}
    ).recipe  # fmt: skip
    return lambda revision=None: stage_data(recipe, folder, revision)[0]


def test_the_key_of_a_stage_knows_the_vae(key, tmp_path):
    without, vae = key(), tmp_path / "pipeline" / "vae"
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    found = {without, key()}
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(bytes(16))
    found.add(key())
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(bytes(15) + b"1")
    found.add(key())
    assert len(found) == 4
    # What lies beside a model from the Hub is fixed by its commit.
    assert key("0" * 40) == without
