import json

import pytest
from compress.errors import PlanError, UsageError
from compress.preflight import check_apart, check_target, check_writable, not_ours, total_memory_bytes


def _published(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    listed = {"export": {"files": [{"name": "model.safetensors"}]}}
    (folder / "report.json").write_text(json.dumps(listed))
    return folder


def test_an_existing_result_needs_overwrite(tmp_path):
    folder = _published(tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        check_target(folder, overwrite=False)
    check_target(folder, overwrite=True)


def test_a_file_that_was_added_to_a_result_keeps_it_from_being_replaced(tmp_path):
    folder = _published(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    assert not_ours(folder) == "notes.txt"
    with pytest.raises(UsageError, match=r"notes\.txt"):
        check_target(folder, overwrite=True)


@pytest.mark.parametrize("report", ["{}", "[]", "no json", '{"export": {"files": [1]}}'])
def test_a_report_of_somebody_else_is_no_leave_to_replace(tmp_path, report):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").write_text(report)
    with pytest.raises(UsageError, match="did not write"):
        check_target(folder, overwrite=True)


def test_an_empty_folder_may_be_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_refused(tmp_path, exists):
    if exists:
        (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="symbolic link"):
        check_target(tmp_path / "out", overwrite=True)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(PlanError, match="is a file"):
        check_writable(tmp_path / "file" / "deeper")
    with pytest.raises(UsageError):
        check_target(tmp_path / "file", overwrite=True)


@pytest.mark.parametrize(
    ("output", "work"), [(".compress/x", ".compress"), ("out", "out/work"), ("out", "out")]
)
def test_output_and_work_directory_lie_apart(output, work, tmp_path):
    with pytest.raises(UsageError, match="within each other"):
        check_apart(tmp_path / output, tmp_path / work)
    check_apart(tmp_path / "out", tmp_path / ".compress")


def test_the_memory_of_this_machine_is_plausible():
    total = total_memory_bytes()
    assert total is None or 2**28 < total < 2**50
