"""The shipped recipe that prunes, recovers and quantizes, at tiny budgets: gates, folder, a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BUDGETS = (
    "calibration.samples=2", "calibration.steps=2",
    "calibration.data.generate=16", "calibration.data.steps=2",
    "stages.0.tinyfusion.steps=24", "stages.0.tinyfusion.batch_size=4",
    "stages.0.tinyfusion.checkpoint_every=4", "stages.1.distill.steps=4", "stages.1.distill.batch_size=4",
    "evaluate.fidelity.samples=2", "evaluate.fidelity.steps=2", "evaluate.quality=null",
    "evaluate.layers=false",
    'require={"size_ratio": "<= 0.22", "linear_bytes_ratio": "<= 0.32", "max_abs_error": "<= 0"}',
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
LIST = "transformer_blocks"
_RELOAD = """
import sys, torch, compress
from safetensors.torch import save_file
model = compress.load("whole", dtype="float32")
generator = torch.Generator().manual_seed(3)
call = {"hidden_states": torch.randn(2, 1, 28, 28, generator=generator), "timestep": torch.tensor([5, 900]),
        "class_labels": torch.tensor([1, 7])}
with torch.no_grad():
    save_file({"out": model(**call).sample}, sys.argv[1])
"""


def started(folder: Path, name: str) -> subprocess.Popen:
    sets = [part for override in (*BUDGETS, f"export.path={name}") for part in ("--set", override)]
    command = [sys.executable, "-m", "compress", "run", "dit_prune_quantize", "--work-dir", f"work-{name}"]
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen([*command, *sets], cwd=folder, stdout=log, stderr=log, env={**os.environ})


def finished(folder: Path, name: str) -> None:
    assert started(folder, name).wait(timeout=900) == 0, (folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the result of one run, `whole`."""
    path = tmp_path_factory.mktemp("chain")
    finished(path, "whole")
    return path


def states(folder: Path, name: str) -> list[Path]:
    return list((folder / f"work-{name}").rglob("training.safetensors"))


def block_tensors(state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return all of the blocks, modulation layers with them; copies of the model's one embedder are none."""
    return [state[name] for name in state if name.startswith(LIST) and "norm1.emb" not in name]


def test_half_the_depth_at_4_bits_is_at_most_0_16_of_the_original_blocks(folder):
    metrics = json.loads((folder / "whole" / "report.json").read_text())["evaluation"]["metrics"]
    stored = block_tensors(load_file(folder / "whole" / WEIGHTS))
    dense = open_model(ModelRef(id="builtin:dit"), progress=SilentProgress()).module
    original = block_tensors(dense.state_dict())
    bfloat16 = sum(2 * tensor.numel() for tensor in original)
    assert 0.1 < sum(tensor.nbytes for tensor in stored) / bfloat16 <= 0.16
    kept = json.loads((folder / "whole" / "depth.json").read_text())["blocks"][LIST]
    assert kept["of"] == 8 and len(kept["kept"]) == 4
    assert metrics["linear_bytes_ratio"] * len(kept["kept"]) / kept["of"] <= 0.16
    assert metrics["size_ratio"] <= 0.22 and metrics["max_abs_error"] == 0.0


def test_fresh_processes_open_the_folder_as_the_run_left_it(folder):
    checked = subprocess.run(
        [sys.executable, "-m", "compress", "verify", "whole"], cwd=folder, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", _RELOAD, name], cwd=folder, check=True, timeout=300)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()


def test_a_run_that_was_killed_in_the_search_ends_with_the_same_bytes(folder):
    process = started(folder, "cut")
    deadline = time.monotonic() + 900
    while not states(folder, "cut") and time.monotonic() < deadline:
        assert process.poll() is None, (folder / "cut.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "cut").exists()
    before = (folder / "cut.log").read_text()
    assert "distill" not in before.rpartition("tinyfusion")[2], "it was killed after the search"
    finished(folder, "cut")
    assert "goes on after step" in (folder / "cut.log").read_text()[len(before) :]
    for file in (WEIGHTS, "depth.json", "config.json"):
        assert (folder / "cut" / file).read_bytes() == (folder / "whole" / file).read_bytes(), file
