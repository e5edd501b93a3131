import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from compress.runtime.atomic import (
    atomic_file,
    atomic_folder,
    locked_folder,
    remove_folder,
    replace_folder,
    scratch_folder,
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
    assert f".partial-{os.getpid()}-" in name


def test_sweep_touches_nothing_that_only_looks_like_ours(tmp_path):
    names = ["movie.partial-1.mp4", ".thesis.partial-draft", ".other.partial-999999999-0123abcd"]
    for name in names[:2]:
        (tmp_path / name).write_text("mine")
    (tmp_path / names[2]).mkdir()
    (tmp_path / ".out.partial-999999999-0123abcd").mkdir()
    sweep_partials(tmp_path, "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(names)


def test_a_folder_is_replaced_by_a_finished_one(tmp_path):
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with scratch_folder(target) as temporary:
        (temporary / "new").write_text("new")
        replace_folder(temporary, target)
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_the_old_folder_stays_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    """Where two names cannot be exchanged at once, a failure between the renames loses nothing."""
    import compress.runtime.atomic as atomic

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "result"
    target.mkdir()
    (target / "old").write_text("old")
    with scratch_folder(target) as temporary:
        (temporary / "new").write_text("new")
        replace_folder(temporary, target)
    assert [entry.name for entry in target.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_remove_folder_takes_everything(tmp_path):
    folder = tmp_path / "x"
    (folder / "y").mkdir(parents=True)
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_who_asks_for_a_folder_waits_for_who_holds_it(tmp_path):
    program = f"""
from pathlib import Path
from compress.runtime.atomic import locked_folder
print("asks", flush=True)
with locked_folder(Path({str(tmp_path)!r})):
    print("has it", flush=True)
"""
    with locked_folder(tmp_path):
        other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "asks\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=0.7)
    assert other.communicate(timeout=60)[0] == "has it\n"
    assert list(tmp_path.iterdir()) == []
