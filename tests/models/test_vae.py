"""Finding the VAE beside a denoiser, and telling it from others."""

import subprocess
import sys

import pytest
from compress.models.vae import vae_beside, vae_hashes
from compress.runtime.hashes import file_sha256


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "transformer"
    path.mkdir()
    return path


def fill(place, weights=b"weights"):
    place.mkdir()
    (place / "config.json").write_text("{}")
    (place / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    (place / "README.md").write_text("of no account")
    return place


def test_it_lies_beside_the_denoiser_or_in_its_folder(folder):
    assert vae_beside(folder) is None
    beside = fill(folder.parent / "vae")
    assert vae_beside(folder) == beside
    inside = fill(folder / "vae")
    assert vae_beside(folder) == inside
    (inside / "config.json").unlink()
    assert vae_beside(folder) == beside, "a folder without a config is none"


def test_it_is_known_by_its_config_and_weights(folder):
    place = fill(folder / "vae")
    names = ("config.json", "diffusion_pytorch_model.safetensors")
    before = vae_hashes(place)
    assert before == [file_sha256(place / name) for name in names]
    (place / "README.md").write_text("of no account either")
    assert vae_hashes(place) == before
    (place / names[1]).write_bytes(b"others")
    assert vae_hashes(place)[0] == before[0] and vae_hashes(place)[1] != before[1]


def test_looking_needs_no_torch():
    code = "import sys, compress.models.vae, compress.fitting_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
