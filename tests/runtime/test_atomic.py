import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from compress.runtime.atomic import (
    TEMPORARY_MARK,
    atomic_file,
    atomic_folder,
    sweep_partials,
    temporary_beside,
)


def test_folder_appears_whole_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "deep" / "result"
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("a")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "a"
    assert [entry.name for entry in target.parent.iterdir()] == ["result"]


def test_failed_body_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "result") as temporary:
        (temporary / "a.txt").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_replaced(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileExistsError), atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert [entry.name for entry in target.iterdir()] == ["old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_file_is_replaced_only_when_the_body_succeeds(tmp_path):
    target = tmp_path / "state.json"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    with atomic_file(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_sweep_removes_what_a_killed_process_left_and_keeps_what_a_living_one_writes(tmp_path):
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from compress.runtime.atomic import atomic_folder
        with atomic_folder(Path(sys.argv[1])) as temporary:
            (temporary / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "result")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    sweep_partials(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "a living process's folder was swept"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.05)
    sweep_partials(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_temporary_names_are_hidden_and_name_their_process(tmp_path):
    name = temporary_beside(tmp_path / "result").name
    assert name.startswith(".result")
    assert f"{TEMPORARY_MARK}{os.getpid()}-" in name
