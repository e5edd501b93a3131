"""Pushes that fail after their commit, or could fail there: what is told, and what is not done twice."""

from __future__ import annotations

import errno

import pytest
from compress.errors import HubError, InterruptedPush, StageError, TagTakenError, VerifyError
from compress.exporters import hub, hub_repository
from compress.progress import SilentProgress
from compress.recipes.export import PushSettings

REPO = "org/model"


def push(folder, **settings):
    settings = PushSettings.model_validate({"repo": REPO, "verify_remote": False, **settings})
    return hub.push_folder(folder, settings, progress=SilentProgress())


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (HubError("org/model: downloading: the Hub failed", hint="later"), HubError),
        (VerifyError("org/model@c: does not verify"), VerifyError),
        (OSError(errno.ENOSPC, "No space left on device"), StageError),
        (KeyboardInterrupt(), InterruptedPush),
    ],
)
def test_what_fails_after_the_commit_names_it(at_hub, exported, monkeypatch, raised, kind):
    def fails(*arguments):
        raise raised

    monkeypatch.setattr(hub, "verify_remote", fails)
    with pytest.raises(kind) as caught:
        push(exported, verify_remote=True, tag="v1")
    made = at_hub.commits(REPO)[0]["oid"]
    url = f"{at_hub.endpoint}/{REPO}"
    assert f"{REPO}: pushed as {made} ({url}), but not verified" in caught.value.message
    assert caught.value.push["commit"] == made and caught.value.push["verified"] is False
    assert caught.value.push["tag"] is None and at_hub.refs(REPO)["tags"] == {}


def test_a_tag_that_cannot_be_set_is_told_with_the_commit(at_hub, exported):
    at_hub.fail("POST", "/tag/", times=9, status=403)
    with pytest.raises(HubError, match=r"pushed as [0-9a-f]{40} \(http.*\), but not tagged: .*403") as caught:
        push(exported, tag="v1")
    assert caught.value.push["commit"] == at_hub.commits(REPO)[0]["oid"]
    assert caught.value.push["tag"] is None


def test_a_tag_that_somebody_set_meanwhile(at_hub, exported, monkeypatch):
    made = hub.commit

    def meanwhile(repository, *arguments):
        repository.api.create_tag(REPO, tag="v1", revision="main")
        return made(repository, *arguments)

    monkeypatch.setattr(hub, "commit", meanwhile)
    with pytest.raises(TagTakenError, match="but not tagged: .*the tag v1 exists") as caught:
        push(exported, tag="v1")
    assert caught.value.push["commit"] == at_hub.commits(REPO)[0]["oid"]


def test_a_pull_request_is_not_opened_twice(at_hub, exported, monkeypatch):
    def fails(self, commit):
        raise HubError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(hub_repository.RemoteRepository, "tag", fails)
        with pytest.raises(HubError, match="discussions/1") as caught:
            push(exported, create_pr=True, tag="v1")
    assert caught.value.push["pull_request"].endswith("/discussions/1")
    result = push(exported, create_pr=True, tag="v1")
    assert at_hub.refs(REPO)["pull_requests"] == {"1": result.commit}
    assert (result.pull_request, result.revision) == (caught.value.push["pull_request"], "refs/pr/1")
    assert result.up_to_date and result.tag == "v1"
    assert push(exported, create_pr=True, revision="next").revision == "refs/pr/2", "to another branch"


def test_a_tag_that_is_taken_is_known_before_the_work(at_hub, exported):
    push(exported, tag="v1")
    settings = PushSettings(repo=REPO, tag="v1")
    with pytest.raises(TagTakenError, match="the tag v1 exists"):
        hub.check_access(settings, new=True)
    hub.check_access(PushSettings(repo=REPO, tag="v2"), new=True)
    hub.check_access(settings)
    assert push(exported, tag="v1").up_to_date


def test_a_tag_wants_the_right_to_write_also_with_a_pull_request(at_hub, monkeypatch):
    at_hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", at_hub.stranger)
    hub.check_access(PushSettings(repo=REPO, create_pr=True))
    with pytest.raises(HubError, match="not permitted") as caught:
        hub.check_access(PushSettings(repo=REPO, create_pr=True, tag="v1"))
    assert caught.value.hint.endswith("use --create-pr without --tag")
