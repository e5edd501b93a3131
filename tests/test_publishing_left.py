"""Pushes at the end of a run that do not all succeed: what is told, and how the rest can be pushed."""

from __future__ import annotations

import errno
import shutil
from types import SimpleNamespace

import pytest
from compress import publishing
from compress.errors import HubError, InterruptedPush, PlanError, StageError, VerifyError
from compress.exporters import hub
from compress.progress import SilentProgress
from compress.recipes.export import ExportSettings, PushSettings


@pytest.fixture
def state(exported):
    """A run that has made two folders, `one` and `two`, for two repositories."""
    exports = []
    for name in ("one", "two"):
        path = shutil.copytree(exported, exported.parent / name)
        push = PushSettings(repo=f"org/{name}", tag="v1", verify_remote=False)
        exports.append(ExportSettings(path=path, push=push))
    events = []
    work = SimpleNamespace(log=lambda event, **fields: events.append(event))
    recipe = SimpleNamespace(export=tuple(exports))
    return SimpleNamespace(recipe=recipe, work=work, progress=SilentProgress(), events=events)


def _push_all(state):
    parts = [{"verified": True}, {"verified": True}]
    publishing.push_all(state, {"export": parts})
    return parts


def _command(state, index, tag=" --tag v1"):
    export = state.recipe.export[index]
    return f"compress push {export.path} {export.push.repo}{tag} --no-verify-remote"


def test_what_was_pushed_before_a_failure_is_told(at_hub, state):
    one, two = (str(export.path) for export in state.recipe.export)
    at_hub.fail("POST", "/api/models/org/two/commit/", times=9, status=403)
    with pytest.raises(HubError, match="two is finished but was not pushed: .*403") as caught:
        _push_all(state)
    assert list(caught.value.pushed) == [one]
    assert caught.value.pushed[one]["commit"] == at_hub.commits("org/one")[0]["oid"]
    assert caught.value.hint.endswith(f"push the finished folder by: {_command(state, 1)}")
    assert state.events == ["pushed", "push_failed"]
    at_hub.reset()
    at_hub.fail("POST", "/tag/", times=9, status=403)
    with pytest.raises(HubError, match="one is finished: org/one: pushed as .* but not tagged") as caught:
        _push_all(state)
    assert list(caught.value.pushed) == [one] and caught.value.pushed[one] == caught.value.push
    assert caught.value.hint.endswith(f"by: {_command(state, 0)} && {_command(state, 1)}")
    at_hub.reset()
    assert [part["push"]["tag"] for part in _push_all(state)] == ["v1", "v1"]


@pytest.mark.parametrize(
    ("raised", "kind", "code"),
    [
        (VerifyError("org/one: does not verify"), VerifyError, 6),
        (HubError("org/one: no answer"), HubError, 7),
        (PlanError("0.01 GB are free", hint="free some space"), StageError, 5),
        (OSError(errno.ENOSPC, "No space left on device"), StageError, 5),
        (KeyboardInterrupt(), InterruptedPush, None),
    ],
)
def test_every_error_tells_the_commands_that_are_left(state, monkeypatch, raised, kind, code):
    def fails(*arguments, **options):
        raise raised

    monkeypatch.setattr(hub, "push_folder", fails)
    with pytest.raises(kind) as caught:
        _push_all(state)
    assert getattr(caught.value, "exit_code", None) == code
    assert "one is finished but was not pushed: " in caught.value.message
    assert caught.value.hint.endswith(
        f"push the finished folders by: {_command(state, 0)} && {_command(state, 1)}"
    )
    assert caught.value.pushed == {} and caught.value.push is None


def test_a_tag_that_is_taken_is_not_in_the_command(at_hub, state):
    at_hub.create("org/one")
    hub.RemoteRepository(state.recipe.export[0].push, SilentProgress()).tag("main")
    with pytest.raises(HubError, match="the tag v1 exists") as caught:
        _push_all(state)
    assert caught.value.hint.endswith(f"by: {_command(state, 0, tag='')} && {_command(state, 1)}")
    assert at_hub.commits("org/one")[1:] == []


def test_a_journal_that_cannot_be_written_hides_no_push(at_hub, state):
    def full(event, **fields):
        raise OSError(errno.ENOSPC, "No space left on device")

    state.work.log, warnings = full, []
    state.progress.warn = warnings.append
    assert [part["push"]["repo"] for part in _push_all(state)] == ["org/one", "org/two"]
    assert len(warnings) == 2 and "No space left" in warnings[0]
