"""A run killed at any moment is finished by the next one, with the same bytes."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compress.report import without_timings

RECIPE = """\
model: builtin:dit
seed: 3
calibration: {samples: 4, steps: 4, batch_size: 4}
stages:
  - vidit_q: {weight_bits: 4, activation_bits: 8}
evaluate:
  fidelity: {samples: 4, steps: 4}
require: {sqnr_db: ">= 1"}
export: {path: out}
"""
KILLS = 10


def _start(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", "run", "recipe.yaml", "--json"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _prepare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def _finish(folder: Path) -> None:
    process = _start(folder)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def _hashes(out: Path) -> dict[str, str]:
    found = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "report.json"
    }
    report = without_timings(json.loads((out / "report.json").read_text()))
    found["report.json without timings"] = hashlib.sha256(json.dumps(report).encode()).hexdigest()
    return found


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path):
    whole = _prepare(tmp_path / "whole")
    started = time.monotonic()
    _finish(whole)
    seconds = time.monotonic() - started
    expected = _hashes(whole / "out")
    assert "diffusion_pytorch_model.safetensors" in expected

    moments = random.Random(20261121)
    killed = 0
    for index in range(KILLS):
        folder = _prepare(tmp_path / f"killed-{index}")
        process = _start(folder)
        try:
            process.wait(timeout=moments.uniform(0.05, 0.98) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        if process.stderr:
            process.stderr.close()
        out = folder / "out"
        assert not out.exists() or _hashes(out) == expected, "a partial folder under the final name"
        if not out.exists():
            _finish(folder)
        assert _hashes(out) == expected
        leftovers = [entry.name for entry in folder.iterdir() if entry.name.startswith(".out")]
        assert leftovers == []
    assert killed >= KILLS - 3, "the run ended before most of the kills"


@pytest.mark.slow
def test_two_runs_give_identical_tensors_and_a_finished_stage_is_reused(tmp_path):
    first, second = _prepare(tmp_path / "first"), _prepare(tmp_path / "second")
    _finish(first)
    _finish(second)
    assert _hashes(first / "out") == _hashes(second / "out")

    (second / "out").rename(second / "before")
    _finish(second)
    report = json.loads((second / "out" / "report.json").read_text())
    assert [stage["resumed"] for stage in report["stages"]] == [True]
    assert _hashes(second / "out") == _hashes(second / "before")
