"""Sensitivities over processes: equal values, and no process left however it ends."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
from compress.calibration.sensitivity_table import read_table

from .. import sessions

pytestmark = pytest.mark.slow  # each test starts up to three processes that load the libraries

PROGRAM = """
import os, signal, sys, time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from compress.calibration.diffusion import record
from compress.calibration.sensitivity import Candidate, Target, measure
from compress.calibration.sensitivity_calls import RecordedCalls
from compress.errors import CompressError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import CalibrationSettings, ModelRef

QUIET = SilentProgress()
PARENT = os.environ.setdefault("PARENT", str(os.getpid()))
HIT = "transformer_blocks.1.ff.net.2"


def opener(folder):
    model = open_model(ModelRef(id=folder), progress=QUIET)
    if sys.argv[3] == "other" and str(os.getpid()) != PARENT:
        model.module.proj_out_1.bias.data += 1
    return model


@contextmanager
def quantizer(name, linear, candidate):
    what = sys.argv[3]
    if what == "slow":
        time.sleep(0.2)
    if name == HIT and what == "killed" and str(os.getpid()) != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == HIT and what == "suicide":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == HIT and what == "defect":
        raise ZeroDivisionError("a defect")
    before, step = linear.weight, linear.weight.abs().max() / 2 ** (candidate.bits - 1)
    broken = torch.nan if what == "nan" and name == HIT else 1.0
    linear.weight = nn.Parameter((before / step).round() * step * broken, requires_grad=False)
    yield
    linear.weight = before


def main(folder, path, what, workers, threads):
    model = opener(folder)
    settings = CalibrationSettings(samples=2, steps=4)
    calibration = record(model, settings, seed=0, cache=None, progress=QUIET)
    candidates = tuple(Candidate("weight", f"w{bits}", bits) for bits in (2, 4))
    targets = [Target(site.name, candidates) for site in model.linears()]
    try:
        measure(
            model, RecordedCalls(calibration, 2), targets, quantizer, path=Path(path), settings={},
            workers=int(workers), threads=int(threads), opener=partial(opener, folder), progress=QUIET,
        )
    except (CompressError, RuntimeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def start(tiny_dit, tmp_path):
    """Return `start(what, workers=2, threads=1, name=...)`: a measuring process, leader of a group."""
    script = tmp_path / "measuring.py"
    script.write_text(PROGRAM)
    started = []

    def begin(what="plain", workers=2, threads=1, name="t.jsonl"):
        command = [sys.executable, script, tiny_dit, tmp_path / name, what, str(workers), str(threads)]
        process = sessions.begin(command)
        started.append(process)
        return process

    yield begin
    for process in started:
        sessions.end(process)


def _values(path):
    return {row.place: (row.value, row.loss) for row in read_table(path).rows}


def _until_rows(process, path, count):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1]
        if path.exists() and path.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.02)
    raise AssertionError("no rows")


def test_two_processes_measure_what_one_does_bit_for_bit(start, tmp_path):
    for workers in (1, 2):
        process = start(workers=workers, name=f"{workers}.jsonl")
        assert process.wait() == 0, process.stderr.read()
    one, two = (_values(tmp_path / f"{workers}.jsonl") for workers in (1, 2))
    assert len(one) == 40
    assert one == two


def test_a_killed_process_is_an_error_that_names_the_layer(start):
    process = start("killed")
    message = process.communicate()[1].strip().splitlines()[-1]
    assert process.returncode == 1
    assert "killed by signal 9, at transformer_blocks.1.ff.net.2, weight w2" in message


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "StageError: transformer_blocks.1.ff.net.2: with its weight at 2 bits (w2) the model's"),
        ("other", "StageError: the model opened for a worker is not the one to be measured"),
        ("defect", "ZeroDivisionError: a defect"),
    ],
)
def test_errors_of_a_process_are_the_parents(start, what, message):
    process = start(what)
    assert message in process.communicate()[1]
    assert process.returncode == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_gives_the_same_values(start, tmp_path, workers):
    whole = start(name="whole.jsonl", workers=1)
    assert whole.wait() == 0, whole.stderr.read()
    path = tmp_path / "t.jsonl"
    if workers == 1:
        process = start("suicide", workers=1)
        assert process.wait() == -signal.SIGKILL
    else:
        process = start("slow")
        _until_rows(process, path, 3)
        process.kill()
        process.wait()
        assert sessions.gone(process.pid)
    kept = path.read_bytes()
    rows = kept.count(b"\n") - 1
    assert 0 < rows < 40
    path.write_bytes(kept + b'{"kind": "wei')
    again = start(workers=workers)
    assert again.wait() == 0, again.stderr.read()
    assert path.read_bytes().startswith(kept)
    assert _values(path) == _values(tmp_path / "whole.jsonl")


def test_ctrl_c_ends_all(start, tmp_path):
    process = start("slow")
    _until_rows(process, tmp_path / "t.jsonl", 1)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert text.count("KeyboardInterrupt") == 1  # the parent's; the others say nothing
    assert sessions.gone(process.pid)
