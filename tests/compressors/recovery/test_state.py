"""What is kept for going on: whole or absent, no pickle, refused when damaged."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compress.errors import StageError
from compress.progress import SilentProgress


class _Told(SilentProgress):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


def _stopping(trainable, at):
    """Let the batch of a step fail once, as a killed process ends; what is on disk stays."""
    whole = trainable.batch

    def batch(step, part, parts):
        if step == at:
            raise KeyboardInterrupt
        return whole(step, part, parts)

    trainable.batch = batch
    return trainable


def _interrupted(regression, trained, settings, folder, at=15, **made):
    with pytest.raises(KeyboardInterrupt):
        trained(_stopping(regression(**made), at), folder, settings)
    [path] = folder.iterdir()
    return path


def _equal(one, other):
    pairs = zip(one.parameters().values(), other.parameters().values(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"accumulate": 2}, {"precision": "bfloat16"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_ends_with_the_same_bytes(changes, dtype, regression, trained, settings, tmp_path):
    made = {"dropout": 0.3, "dtype": dtype}
    whole, resumed = regression(**made), regression(**made)
    losses = trained(whole, tmp_path / "whole", settings(**changes)).losses
    _interrupted(regression, trained, settings(**changes), tmp_path / "cut", **made)
    told = _Told()
    result = trained(resumed, tmp_path / "cut", settings(**changes), progress=told)
    assert result.resumed_at == 12 and told.notes == ["training goes on after step 12 of 20"]
    assert result.losses == losses
    assert _equal(whole, resumed)


def test_the_state_is_safetensors_and_says_what_it_is(regression, trained, settings, tmp_path):
    path = _interrupted(regression, trained, settings(ema=0.5), tmp_path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert path.suffix == ".safetensors"
    kinds = {name.split("/")[0] for name in header} - {"__metadata__"}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "updates", "average", "losses"}
    assert {item["dtype"] for name, item in header.items() if "/" in name} == {"F32"}
    assert header["losses"]["shape"] == [12]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _other(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 an archive of pickles")


@pytest.mark.parametrize("damage", [_flip, _cut, _other])
def test_a_damaged_state_is_told_and_not_used(damage, regression, trained, settings, tmp_path):
    whole, again = regression(), regression()
    trained(whole, tmp_path / "whole", settings())
    damage(_interrupted(regression, trained, settings(), tmp_path / "cut"))
    told = _Told()
    assert trained(again, tmp_path / "cut", settings(), progress=told).resumed_at == 0
    assert len(told.warnings) == 1 and told.warnings[0].endswith("the training starts over")
    assert _equal(whole, again)


def test_the_state_of_another_training_is_not_used(regression, trained, settings, tmp_path):
    _interrupted(regression, trained, settings(), tmp_path)
    told = _Told()
    assert trained(regression(), tmp_path, settings(), key="other", progress=told).resumed_at == 0
    assert "of another training" in told.warnings[0]


def test_after_an_error_the_next_run_goes_on_before_it(regression, trained, settings, tmp_path):
    failing, whole, resumed = regression(), regression(), regression()
    trained(whole, tmp_path / "whole", settings())
    loss, calls = failing.loss, []

    def failing_once(batch):
        calls.append(None)
        value, numbers = loss(batch)
        return (value * float("inf") if len(calls) == 10 else value), numbers

    failing.loss = failing_once
    with pytest.raises(StageError, match="step 10 of 20"):
        trained(failing, tmp_path / "cut", settings())
    assert trained(resumed, tmp_path / "cut", settings()).resumed_at == 6
    assert _equal(whole, resumed)


_PROGRAM = """
import importlib.util, sys, time
from pathlib import Path
from safetensors.torch import save_file
spec = importlib.util.spec_from_file_location("given", sys.argv[1])
given = importlib.util.module_from_spec(spec)
sys.modules["given"] = given
spec.loader.exec_module(given)
trainable = given.Regression(dropout=0.3)
batch = trainable.batch
def slow(step, part, parts):
    time.sleep(float(sys.argv[3]))
    return batch(step, part, parts)
trainable.batch = slow
result = given.run_training(trainable, Path(sys.argv[2]), given.settings_of(checkpoint_every=1, ema=0.9))
save_file({name: item.detach() for name, item in trainable.parameters().items()}, Path(sys.argv[2], "end"))
Path(sys.argv[2], "resumed").write_text(str(result.resumed_at))
"""


def _start(folder: Path, seconds: float) -> subprocess.Popen:
    given = Path(__file__).with_name("conftest.py")
    command = [sys.executable, "-c", _PROGRAM, str(given), str(folder), str(seconds)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_what_a_killed_write_left_is_swept(regression, trained, settings, tmp_path):
    path = _interrupted(regression, trained, settings(), tmp_path)
    program = """
import os, sys
from pathlib import Path
from compress.runtime.atomic import atomic_file
with atomic_file(Path(sys.argv[1])) as half:
    half.write_bytes(b"half a state")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    assert trained(regression(), tmp_path, settings()).resumed_at == 12
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _start(whole, 0.0).wait() == 0
    process = _start(cut, 0.2)
    deadline = time.monotonic() + 120
    while not list(cut.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.7)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (cut / "end").exists()
    assert _start(cut, 0.0).wait() == 0
    assert 0 < int((cut / "resumed").read_text()) < 20
    assert (cut / "end").read_bytes() == (whole / "end").read_bytes()
