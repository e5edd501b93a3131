"""What `compress plan` knows of DiT-XL/2 from its config alone."""

import json
import subprocess
import sys

import pytest

from ..dit_xl import CONFIG, WHOLE, write_config


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    write_config(folder / "dit-xl")
    done = subprocess.run(
        [sys.executable, "-m", "compress", "plan", "dit_xl_w4a8", "--model", "dit-xl", "--json"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["dit-xl"]
    return json.loads(done.stdout)


def test_parameters_and_operations_are_the_papers(planned):
    before = planned["stages"][0]["before"]
    assert before["parameters"] == pytest.approx(WHOLE.published, rel=0.001)
    assert before["parameters_stored"] == WHOLE.parameters_stored
    assert before["macs"] == pytest.approx(WHOLE.macs, rel=0.01)


def test_operations_without_attention_products():
    from compress.models.dit import DiTFamily

    assert DiTFamily().macs(CONFIG, attention_products=False) == pytest.approx(WHOLE.linear_macs, rel=0.01)


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
