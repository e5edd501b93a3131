import json
from importlib.util import find_spec

import pytest
from compress.errors import PlanError, UsageError, VerifyError
from compress.preflight import (
    check_access,
    check_apart,
    check_one_process,
    check_target,
    check_targets,
    check_writable,
    not_ours,
    push_command,
    total_memory_bytes,
)
from compress.recipes.export import ExportSettings, PushSettings


def _published(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    listed = {"export": {"files": [{"name": "model.safetensors"}]}}
    (folder / "report.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("rank", "count", "refused"), [("1", "2", True), ("0", "1", False), (None, "4", False)]
)
def test_a_run_is_one_process(rank, count, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    if refused:
        with pytest.raises(UsageError, match="started 2 of them"):
            check_one_process()
    else:
        check_one_process()


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


def _exports(*paths, **options):
    return [ExportSettings(path=path, **options) for path in paths]


def test_outputs_that_a_link_puts_into_each_other_are_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    work = tmp_path / "work"
    for other in ("link/out", "link/out/inner", "real/out.rejected"):
        with pytest.raises(UsageError, match="these outputs lie within each other"):
            check_targets(_exports(tmp_path / "real/out", tmp_path / other), work, overwrite=None)
    check_targets(_exports(tmp_path / "real/out", tmp_path / "link/other"), work, overwrite=None)
    with pytest.raises(UsageError, match="within each other"):
        check_targets(_exports(tmp_path / "real/out"), tmp_path / "link", overwrite=None)


def test_each_export_says_whether_it_may_be_replaced(tmp_path):
    one, two = _published(tmp_path / "one"), _published(tmp_path / "two")
    exports = [*_exports(one, overwrite=True), *_exports(two)]
    with pytest.raises(UsageError, match="two: the output folder exists"):
        check_targets(exports, tmp_path / "work", overwrite=None)
    check_targets(exports, tmp_path / "work", overwrite=True)
    with pytest.raises(UsageError, match="one: the output folder exists"):
        check_targets(exports, tmp_path / "work", overwrite=False)


def test_a_finished_folder_that_was_to_be_pushed_can_be_pushed_as_it_is(tmp_path):
    folder = _published(tmp_path / "out")
    with pytest.raises(UsageError) as caught:
        check_targets(_exports(folder, push="org/name@next"), tmp_path / "work", overwrite=None)
    assert caught.value.hint.startswith(f"`compress push {folder} org/name@next` pushes it as it is; or ")


@pytest.mark.parametrize(
    ("private", "option"), [({}, ""), ({"private": True}, " --private"), ({"private": False}, " --public")]
)
def test_the_command_of_a_push_keeps_who_may_see_it(tmp_path, private, option):
    push = PushSettings(repo="org/name", **private)
    assert push_command(tmp_path, push) == f"compress push {tmp_path} org/name{option}"


def test_a_tag_is_looked_up_for_what_is_yet_to_be_made(tmp_path, monkeypatch):
    from compress.exporters import hub

    asked = []
    monkeypatch.setattr(hub, "check_access", lambda push, **options: asked.append((push.repo, options)) or ())
    check_access(_exports(tmp_path / "out", push="org/name"))
    assert asked == [("org/name", {"new": True})]


def test_what_speaks_against_a_push_stops_a_strict_run_before_its_work(tmp_path, monkeypatch):
    from compress.exporters import hub

    monkeypatch.setattr(hub, "check_access", lambda push, **options: ("the repository stays public",))
    exports = _exports(tmp_path / "out", push="org/name")
    check_access(exports)
    with pytest.raises(VerifyError, match="under --strict: org/name: the repository stays public"):
        check_access(exports, strict=True)


def test_what_could_not_be_executed_here_is_not_pushed(tmp_path):
    if find_spec("sdnq") is not None:
        pytest.skip("sdnq is installed")
    with pytest.raises(PlanError, match="must be executed, and sdnq is not installed"):
        check_access(_exports(tmp_path / "out", format="sdnq", push="org/name"))
    check_access(_exports(tmp_path / "out", format="sdnq"))


def test_the_memory_of_this_machine_is_plausible():
    total = total_memory_bytes()
    assert total is None or 2**28 < total < 2**50
