import json

import pytest
from compress.errors import StageError
from compress.workdir import WorkDirectory, digest


@pytest.fixture
def work(tmp_path):
    directory = WorkDirectory(tmp_path / ".compress")
    with directory.locked():
        yield directory


def _write(work, key="k" * 64, text="weights"):
    folder = work.stage_folder(key, "rtn")
    work.write_stage(
        folder, {"method": "rtn", "seconds": 1.0}, lambda path: (path / "model.bin").write_text(text)
    )
    return folder


def test_a_finished_stage_is_read_back(work):
    folder = _write(work)
    record = work.read_stage(folder)
    assert record["method"] == "rtn"
    assert list(record["files"]) == ["model.bin"]


def test_an_absent_stage_is_none(work):
    assert work.read_stage(work.stage_folder("0" * 64, "rtn")) is None


def test_a_damaged_stage_is_not_reused_and_is_written_anew(work):
    folder = _write(work)
    (folder / "model.bin").write_text("w3ights")
    assert work.read_stage(folder) is None
    _write(work, text="again")
    assert work.read_stage(folder) is not None
    assert (folder / "model.bin").read_text() == "again"


def test_a_failed_write_leaves_no_stage(work):
    folder = work.stage_folder("1" * 64, "rtn")

    def fail(path):
        (path / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        work.write_stage(folder, {}, fail)
    assert list(folder.parent.iterdir()) == []


def test_a_second_run_in_the_same_directory_is_refused(work):
    with pytest.raises(StageError, match="another run"), WorkDirectory(work.root).locked():
        pytest.fail("the lock was taken twice")


def test_the_journal_is_json_lines(work):
    work.log("stage", method="rtn")
    work.log("done")
    events = [json.loads(line) for line in (work.root / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage", "done"]


def test_digest_depends_on_content_and_not_on_order():
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_the_journal_holds_no_token(work, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-no-known-form")
    token = "hf_" + "x" * 34
    work.log("rejected", reasons=[f"https://me:pass@host/a?token={token}", "a-secret-of-no-known-form"])
    text = (work.root / "events.jsonl").read_text()
    assert not any(secret in text for secret in ("a-secret", "pass", token))
    assert json.loads(text)["event"] == "rejected"


def test_what_finished_stages_left_behind_is_cleared_and_the_rest_kept(tmp_path):
    work = WorkDirectory(tmp_path / ".compress")
    folder = _write(work)
    for stage in (folder, folder.with_name("unfinished")):
        (work.working_folder(stage) / "bank").write_text("layers")
    damaged = work.stage_folder("d" * 64, "rtn")
    damaged.mkdir()
    work.working_folder(damaged)
    with work.locked():
        left = sorted(path.name for path in folder.parent.glob("*.working"))
    assert left == sorted([f"{damaged.name}.working", "unfinished.working"])
    assert work.read_stage(folder) is not None
