"""The shipped recipe for Segment Anything does what its header says, and the stock class loads the result."""

import json
import subprocess
import sys

import pytest

PLAIN = """
import json, sys
import torch
from transformers import SamModel
model, notes = SamModel.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
assert "compress" not in sys.modules
vision = model.config.vision_config
with torch.no_grad():
    pixels, points = torch.zeros(1, 3, 128, 128), torch.tensor([[[[40.0, 50.0]]]])
    scores, masks = model.eval()(pixel_values=pixels, input_points=points, return_dict=False)[:2]
print(json.dumps([vision.hidden_size, vision.mlp_dim, list(masks.shape), bool(torch.isfinite(scores).all())]))
"""


def run(folder, *arguments):
    result = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_half_the_width_keeps_nine_tenths_of_the_masks(tmp_path):
    program = "import sys; from compress.cli.main import main; sys.exit(main())"
    run(tmp_path, "-c", program, "run", "sam_slimsam", "--quiet")
    out = tmp_path / "out" / "sam-slimsam"
    report = json.loads((out / "report.json").read_text())
    assert all(row["passed"] for row in report["gates"]) and report["export"]["verified"]
    metrics = report["evaluation"]["metrics"]
    assert 0.90 <= metrics["mask_agreement"] < 1.0 and metrics["miou_original"] > 0.7
    (stage,) = report["stages"]
    phases = stage["details"]["phases"]
    errors = [phase["output_error"] for phase in phases]
    assert [phase["kind"] for phase in phases] == ["pruning", "aligning"] * 2
    assert errors[1] < 0.5 * errors[0] and errors[3] < 0.5 * errors[2]
    assert stage["details"]["widths"]["embedding"] == [120, 60]
    answer = json.loads(run(tmp_path, "-P", "-c", PLAIN, str(out)).splitlines()[-1])
    assert answer == [60, 240, [1, 1, 3, 64, 64], True]
    card = (out / "README.md").read_text()
    assert "](masks.png)" in card
