"""A run killed at any moment is finished by the next one, with the same bytes."""

import hashlib
import json
import random
import shutil
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


def _start(folder: Path, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "compress", "run", "recipe.yaml", "--json", *options],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _prepare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def _finish(folder: Path, *options: str) -> None:
    process = _start(folder, *options)
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


def _kill_after(folder: Path, seconds: float, *options: str) -> bool:
    """Start a run and kill it with signal 9; False where it ended by itself before."""
    process = _start(folder, *options)
    try:
        process.wait(timeout=seconds)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    finally:
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.slow
def test_kill_at_ten_random_moments(tmp_path):
    """Every second run replaces an older result: at any moment that one or the new one is there."""
    older = _prepare(tmp_path / "older")
    (older / "recipe.yaml").write_text(RECIPE.replace("seed: 3", "seed: 4"))
    _finish(older)
    whole = _prepare(tmp_path / "whole")
    started = time.monotonic()
    _finish(whole)
    seconds = time.monotonic() - started
    before, expected = _hashes(older / "out"), _hashes(whole / "out")
    assert "diffusion_pytorch_model.safetensors" in expected
    assert before != expected

    moments = random.Random(20261121)
    killed = 0
    for index in range(KILLS):
        folder = _prepare(tmp_path / f"killed-{index}")
        out = folder / "out"
        replaces = index % 2 == 1
        options = ("--overwrite",) if replaces else ()
        if replaces:
            shutil.copytree(older / "out", out)
        killed += _kill_after(folder, moments.uniform(0.05, 0.98) * seconds, *options)
        assert out.exists() or not replaces, "the older result is gone before the new one is there"
        whole_states = (before, expected) if replaces else (expected,)
        assert not out.exists() or _hashes(out) in whole_states, "a partial folder under the final name"
        if not out.exists() or _hashes(out) != expected:
            _finish(folder, *options)
        assert _hashes(out) == expected
        leftovers = [path for path in folder.rglob("*") if ".partial-" in path.name]
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
