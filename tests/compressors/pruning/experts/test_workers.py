"""Evaluations in processes and on Ray: the same archive as in one, and no process left however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from .... import sessions

pytestmark = pytest.mark.slow  # every test starts two or three processes that load torch

PROGRAM = Path(__file__).with_name("judged.py")


@pytest.fixture
def start(tmp_path):
    """Return `start(workers, lag, what="plain", **environment)`: a search, with a session of its own."""
    started = []

    def begin(workers, lag, what="plain", **environment):
        (tmp_path / "archive").mkdir(exist_ok=True)
        command = [sys.executable, PROGRAM, tmp_path / "archive", workers, lag, what]
        process = sessions.begin(command, **{"OMP_NUM_THREADS": "2", **environment})
        started.append(process)
        return process

    yield begin
    for process in started:
        sessions.end(process)


def _done(process) -> str:
    """Wait for the end and return what it said."""
    out, err = process.communicate(timeout=120)
    assert out == ""
    return err


def _until(happened, process) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.02)


@pytest.mark.parametrize(("lag", "workers"), [(2, 2), (4, 3)])
def test_processes_find_what_one_finds_bit_for_bit(landscape, start, tmp_path, lag, workers):
    landscape.finished(tmp_path / "here", landscape.search(lag=lag), landscape.coarse)
    process = start(workers, lag)
    assert _done(process) == "" and process.returncode == 0
    assert landscape.files(tmp_path / "archive") == landscape.files(tmp_path / "here")
    opened = (tmp_path / "archive.log").read_text().split()
    assert len(opened) == workers and str(process.pid) not in opened


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("closed", "SourceError: the folder is gone (look where it went)"),
        ("defect", "ZeroDivisionError: a defect"),
        ("killed", "was killed by signal 9, at individual "),
    ],
)
def test_what_a_process_fails_of_is_said_and_what_is_finished_is_kept(start, tmp_path, what, message):
    process = start(2, 2, what)
    text = _done(process)
    assert process.returncode == 1
    assert message in text.replace("\n", " ")
    if what == "killed":
        assert text.startswith("StageError: a process that measures a landscape ")
        assert "take fewer workers" in text
    kept = len(list((tmp_path / "archive").glob("*.safetensors")))
    assert kept == 0 if what == "closed" else 20 <= kept < 70


def test_ctrl_c_ends_all_and_the_next_run_goes_on(landscape, start, tmp_path):
    process = start(2, 2, "slow")
    _until(lambda: len(list((tmp_path / "archive").iterdir())) >= 5, process)
    os.killpg(process.pid, signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert text.count("KeyboardInterrupt") == 1  # the parent's; the others say nothing
    assert sessions.gone(process.pid)
    kept = landscape.files(tmp_path / "archive")
    landscape.finished(tmp_path / "archive", landscape.search(lag=2), landscape.coarse)
    landscape.finished(tmp_path / "here", landscape.search(lag=2), landscape.coarse)
    found = landscape.files(tmp_path / "archive")
    assert found == landscape.files(tmp_path / "here")
    assert all(found[name] == content for name, content in kept.items()) and len(kept) < len(found)


@pytest.fixture
def of_ray():
    """Yield the environment of a Ray that knows nothing but a folder of its own, with a short name."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        before = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
        assert "RAY_ADDRESS" not in before, "a cluster is there, and the tests would use it"
        yield {"RAY_TMPDIR": folder, "HOME": folder, "HF_HUB_OFFLINE": "1"}


def test_actors_of_a_local_cluster_find_what_one_process_finds(landscape, start, tmp_path, of_ray):
    landscape.finished(tmp_path / "here", landscape.search(lag=3), landscape.coarse)
    process = start("ray:2", 3, **of_ray)
    assert _done(process) == "" and process.returncode == 0
    assert landscape.files(tmp_path / "archive") == landscape.files(tmp_path / "here")
    opened = (tmp_path / "archive.log").read_text().split()
    assert len(set(opened)) == 2 and str(process.pid) not in opened
    logs = Path(of_ray["RAY_TMPDIR"], "ray", "session_latest", "logs")
    assert "Usage reporting is disabled" in (logs / "dashboard.log").read_text()
    assert sessions.gone(process.pid), "the cluster that it started is left"


def test_a_cluster_that_is_there_is_joined_and_stays(start, tmp_path, of_ray):
    options = ["--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    cluster = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", *options], start_new_session=True,
        env={**os.environ, **of_ray, "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = Path(of_ray["RAY_TMPDIR"], "ray")
    try:
        _until(lambda: (folder / "ray_current_cluster").is_file(), cluster)
        there = set(sessions.members(cluster.pid))
        process = start("ray", 2, "killed", **of_ray)
        text = _done(process)
        assert process.returncode == 1
        assert text.startswith("StageError: a Ray actor that measures a landscape died, at individual ")
        assert 20 <= len(list((tmp_path / "archive").glob("*.safetensors"))) < 70
        assert sessions.gone(process.pid)
        assert cluster.poll() is None and there <= set(sessions.members(cluster.pid))
        assert len(list(folder.glob("session_2*"))) == 1  # none was started beside it
    finally:
        cluster.terminate()
        cluster.wait(timeout=60)
    assert sessions.gone(cluster.pid)
