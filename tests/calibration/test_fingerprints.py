"""Latents and images count by content until they are very many, and both by one rule."""

import os

import pytest
import torch
from compress.calibration import fingerprints
from compress.calibration.image_files import find_images
from compress.calibration.latent_files import find_latents, fingerprint
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images" / "cat" / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path, lambda: find_images(tmp_path / "images").fingerprint()


@pytest.fixture
def latents(tmp_path):
    path = tmp_path / "latents" / "a.safetensors"
    path.parent.mkdir()
    save_file({"latents": torch.zeros(2, 4, 8, 8)}, path)
    return path, lambda: fingerprint(find_latents(tmp_path / "latents"))


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_content_counts_and_of_very_much_the_time(request, kind, monkeypatch):
    path, found = request.getfixturevalue(kind)
    before = found()
    os.utime(path, (1, 1))
    assert found() == before
    monkeypatch.setattr(fingerprints, "HASHED_BYTES", path.stat().st_size)
    assert found() == before, "up to the limit, the limit included"
    monkeypatch.setattr(fingerprints, "HASHED_BYTES", path.stat().st_size - 1)
    by_time = found()
    assert by_time != before
    os.utime(path, (2, 2))
    assert found() != by_time
