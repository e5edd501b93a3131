"""`compress push` as a user calls it, against a Hub on loopback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

REPO = "org/model"


@pytest.fixture
def push(hub, tmp_path):
    """Call `compress push FOLDER ARGS` in a process of its own."""

    def call(folder, *arguments, token=""):
        return subprocess.run(
            [sys.executable, "-m", "compress", "push", str(folder), *arguments],
            env=hub.environment(tmp_path / "home", token),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


@pytest.mark.slow
def test_a_push_to_a_new_repository_is_verified_and_tagged(push, hub, exported):
    done = push(exported, f"{REPO}@candidate", "--tag", "v1.0", "--message", "The first one", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)["push"]
    (made, _) = hub.commits(REPO, "candidate")
    assert document["commit"] == made["oid"]
    assert document["verified"] is True
    assert made["title"] == "The first one"
    assert hub.refs(REPO)["tags"] == {"v1.0": made["oid"]}
    assert hub.private(REPO)
    assert hub.writer not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_result_is_shown_to_people(push, hub, exported):
    first = push(exported, REPO, "--no-verify-remote", "--public")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].startswith(f"{hub.endpoint}/{REPO}: 1")
    assert not hub.private(REPO)
    assert f"upload to {REPO}" in first.stderr
    again = push(exported, REPO, "--no-verify-remote")
    assert again.stdout.splitlines()[-1] == f"{hub.endpoint}/{REPO}: was up to date"


@pytest.mark.slow
def test_a_pull_request(push, hub, exported):
    done = push(exported, REPO, "--create-pr", "--no-verify-remote", "--json", "--quiet")
    assert json.loads(done.stdout)["push"]["pull_request"] == f"{hub.endpoint}/{REPO}/discussions/1"
    assert done.stderr == ""


def test_without_a_token(push, hub, exported):
    done = push(exported, REPO, token=None)
    assert done.returncode == 7
    assert f"error: {REPO}: there is no access token" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.requests()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["model"], "ORG/NAME: 'model' is not a repository; write it as org/name"),
        (["org/model", "--tag", "refs/x"], "--tag: 'refs/x' is not the name of a branch or tag"),
        (["org/model@a", "--revision", "b"], "a branch is given twice"),
        (["org/model", "--message", ""], "--message: "),
    ],
)
def test_wrong_options(call, tmp_path, arguments, text):
    result = call("push", str(tmp_path), *arguments)
    assert result.code == 2
    assert text in result.err


def test_folders_that_are_none_of_ours(call, tmp_path):
    assert call("push", "absent", "org/model").code == 4
    result = call("push", str(tmp_path), "org/model")
    assert result.code == 4
    assert "holds no report.json" in result.err


def test_a_damaged_folder_is_refused_before_any_traffic(push, hub, exported):
    (exported / "config.json").write_text("{}")
    done = push(exported, REPO)
    assert done.returncode == 6
    assert "config.json" in done.stderr
    assert not hub.requests()


def test_a_rejected_folder_is_refused(push, hub, exported):
    done = push(exported.rename(exported.with_name("dit-w8.rejected")), REPO)
    assert done.returncode == 6
    assert "this result was rejected" in done.stderr
    assert not hub.requests()
