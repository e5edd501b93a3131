"""What `compress plan` knows of DiT-XL/2 from its config alone."""

import json
import subprocess
import sys

import pytest

DIT_XL_2 = {
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.40.0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    (folder / "dit-xl").mkdir()
    (folder / "dit-xl" / "config.json").write_text(json.dumps(DIT_XL_2))
    done = subprocess.run(
        [sys.executable, "-m", "compress", "plan", "dit_xl_w4a8", "--model", "dit-xl", "--json"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["dit-xl"]
    return json.loads(done.stdout)


def test_parameters_and_operations_are_the_papers(planned):
    before = planned["stages"][0]["before"]
    assert before["parameters"] == pytest.approx(675e6, rel=0.005)
    assert before["parameters_stored"] == 749_826_464
    assert before["macs"] == pytest.approx(118.7e9, rel=0.01)


def test_operations_without_attention_products():
    from compress.models.dit import DiTFamily

    assert DiTFamily().macs(DIT_XL_2, attention_products=False) == pytest.approx(114.44e9, rel=0.01)


def test_w4a8_with_8_bit_modulation_is_at_least_2_45_times_smaller(planned):
    before, after = planned["stages"][0]["before"], planned["stages"][0]["after"]
    assert before["bytes"] >= 2.45 * planned["export"]["bytes"]
    assert before["bytes"] >= 2.45 * after["bytes"]
    stored_as_published = 2 * before["parameters_stored"]
    assert stored_as_published >= 2.45 * planned["export"]["bytes"]


def test_the_label_comes_with_the_average_bits(planned):
    notes = " ".join(planned["stages"][0]["notes"])
    assert "W4A8" in notes
    assert "bits per weight on average" in notes
