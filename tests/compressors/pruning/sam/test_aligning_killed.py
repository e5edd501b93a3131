"""An aligning that is killed at any of its writes goes on to the bytes of an undisturbed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_killed_at_every_write(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Best weights of steps 0, 3, 8 and 10, states of 3, 6 and 9, the record of the end: before and after.
    assert done.stdout.splitlines()[-1] == "deaths 16"
    resumed = {line.split()[-1] for line in done.stdout.splitlines() if "resumed at" in line}
    assert resumed >= {"0", "3", "6", "9", "12"}
    assert Path(tmp_path, "whole", "end").stat().st_size > 10_000
