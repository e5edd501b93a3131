"""Real processes: killed in the middle of a run, and several that train together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compress.compressors.recovery.best import Choosing
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

_TOGETHER = """
import importlib.util, sys
from pathlib import Path
from safetensors.torch import save_file
from accelerate import PartialState
spec = importlib.util.spec_from_file_location("given", sys.argv[1])
given = importlib.util.module_from_spec(spec)
sys.modules["given"] = given
spec.loader.exec_module(given)
trainable, folder = given.Regression(), Path(sys.argv[2])
result = given.run_training(trainable, folder, given.settings_of(accumulate=2, ema=0.9))
state = PartialState()
weights = {name: item.detach() for name, item in trainable.parameters().items()}
save_file(weights, folder / f"end-{state.process_index}-{state.num_processes}.safetensors")
state.destroy_process_group()
"""


def test_two_processes_train_as_one(tmp_path, regression, trained, settings):
    program = tmp_path / "together.py"
    program.write_text(_TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = str(Path(__file__).with_name("conftest.py"))
    subprocess.run([*launcher, str(program), given, str(tmp_path / "both")], check=True, timeout=900)
    alone = regression()
    trained(alone, tmp_path / "alone", settings(accumulate=4, ema=0.9))  # parts of the same size
    first, second = (load_file(tmp_path / "both" / f"end-{index}-2.safetensors") for index in range(2))
    for name, item in alone.parameters().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], item, atol=1e-6)
    # The state of two is one that a single process goes on with.
    [state] = (tmp_path / "both").glob("training*")
    state.rename(tmp_path / "alone" / "training.safetensors")
    resumed = regression()
    assert trained(resumed, tmp_path / "alone", settings(accumulate=2, ema=0.9)).resumed_at == 18
    assert all(torch.allclose(first[name], item, atol=1e-6) for name, item in resumed.parameters().items())


_BEST = """
import importlib.util, os, sys
from pathlib import Path
from safetensors.torch import save_file
from accelerate import PartialState
from compress.compressors.recovery.best import Choosing
spec = importlib.util.spec_from_file_location("given", sys.argv[1])
given = importlib.util.module_from_spec(spec)
sys.modules["given"] = given
spec.loader.exec_module(given)
trainable, folder = given.Regression(), Path(sys.argv[2])
values = {0: 9.0, 4: 7.0, 9: 2.0, 14: 3.0, 20: 4.0}

# Each process measures a little differently, as devices may; the first one's numbers count.
def watch(done, weights):
    return [done, values[done] - 1e-3 * int(os.environ["RANK"])] if done in values else None

choosing = Choosing(lambda value, other: value < other, lambda done, rows: 1e-2 * rows[-1][1])
result = given.run_training(
    trainable, folder, given.settings_of(accumulate=2), watch=watch, choosing=choosing, summed=True
)
assert [row[1] for row in result.rows] == list(values.values()), result.rows
state = PartialState()
weights = {name: item.detach() for name, item in trainable.parameters().items()}
save_file(weights, folder / f"end-{state.process_index}-{state.num_processes}.safetensors")
state.destroy_process_group()
"""


def test_two_processes_end_with_the_same_best_weights(tmp_path, regression, trained, settings):
    program = tmp_path / "best.py"
    program.write_text(_BEST)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = str(Path(__file__).with_name("conftest.py"))
    subprocess.run([*launcher, str(program), given, str(tmp_path / "both")], check=True, timeout=900)
    alone, values = regression(), {0: 9.0, 4: 7.0, 9: 2.0, 14: 3.0, 20: 4.0}
    trained(
        alone, tmp_path / "alone", settings(accumulate=4), summed=True,
        watch=lambda done, _: [done, values[done]] if done in values else None,
        choosing=Choosing(lambda value, other: value < other, lambda done, rows: 1e-2 * rows[-1][1]),
    )  # fmt: skip
    first, second = (load_file(tmp_path / "both" / f"end-{index}-2.safetensors") for index in range(2))
    for name, item in alone.parameters().items():
        assert torch.equal(first[name], second[name])
        assert torch.allclose(first[name], item, atol=1e-6)


_RECIPE = """
model: {model}
seed: 1
calibration: {{images: {images}, samples: 4}}
stages:
  - finetune: {{steps: 100, batch_size: 8, checkpoint_every: 10, mixup: 0.2, distill: {{weight: 0.5}}}}
evaluate: {{fidelity: null}}
export: {{path: {path}}}
"""


def _run(folder: Path, name: str, recipe: str) -> subprocess.Popen:
    (folder / f"{name}.yaml").write_text(recipe)
    command = [sys.executable, "-m", "compress", "run", f"{name}.yaml", "--work-dir", f"work-{name}"]
    log = (folder / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env={**os.environ})


def test_a_run_that_was_killed_in_training_goes_on_to_the_same_bytes(vit, images, tmp_path):
    vit(dropout=0.1).save_pretrained(tmp_path / "vit")
    data = images(count=40)
    pixels = (data.values * 40 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    save_file({"pixels": pixels, "labels": data.labels}, tmp_path / "images.safetensors")
    recipes = {
        name: _RECIPE.format(model=tmp_path / "vit", images=tmp_path / "images.safetensors", path=name)
        for name in ("whole", "cut")
    }
    assert _run(tmp_path, "whole", recipes["whole"]).wait(timeout=900) == 0
    process = _run(tmp_path, "cut", recipes["cut"])
    deadline = time.monotonic() + 900
    while not list((tmp_path / "work-cut").rglob("training.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "cut.log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert _run(tmp_path, "cut", recipes["cut"]).wait(timeout=900) == 0
    assert "training goes on after step" in (tmp_path / "cut.log").read_text()
    assert not list((tmp_path / "work-cut").rglob("training.safetensors"))  # cleared once the stage is done
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()
