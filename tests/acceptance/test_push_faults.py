"""`compress push` as a process against a Hub that fails: a push ends well, or says why and can be repeated.

After every test each file that any commit names is read on the server and hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MIB = 1 << 20
REPO = "org/model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECIPE = """\
model: {model}
seed: 0
calibration: {{samples: 1, steps: 1}}
stages:
  - rtn: {{keep: ["*.to_k", "*.to_v", "*.to_out.0", "*.ff.*", "transformer_blocks.1.*"]}}
evaluate: {{fidelity: {{samples: 1, steps: 1}}}}
export:
{exports}
"""


def _export(folder: Path, model: Path, *exports: str) -> None:
    """Run a recipe that quantizes one layer and leaves the others in float32."""
    lines = "\n".join(f"  - {export}" for export in exports)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, exports=lines))
    command = [sys.executable, "-m", "compress", "run", "recipe.yaml", "--quiet"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def large(tiny_cache, tmp_path_factory):
    """Two exported folders with 211 MB of weights: `whole` has one file, `shards` has four."""
    folder = tmp_path_factory.mktemp("large")
    wide = (("attention_head_dim", 72), ("num_attention_heads", 16))
    model = tiny_cache("DiTTransformer2DModel", 0, "float32", wide)
    _export(folder, model, "{path: whole}", "{path: shards, max_shard_size: 60MB}")
    shutil.rmtree(folder / ".compress")
    return folder


@pytest.fixture(scope="module")
def small(tiny_cache, tmp_path_factory):
    """An exported folder of a tiny model."""
    folder = tmp_path_factory.mktemp("small")
    _export(folder, tiny_cache("DiTTransformer2DModel", 0, "float32", ()), "{path: out}")
    return folder / "out"


@dataclass
class Pushed:
    code: int
    out: str
    err: str
    seconds: float

    @property
    def result(self):
        assert self.code == 0, self.err
        return json.loads(self.out)["push"]

    def fails_with(self, *texts: str) -> None:
        """Hold the exit code and what is said against a failure of the Hub."""
        assert self.code == 7, (self.code, self.out, self.err)
        for text in texts:
            assert text in self.out + self.err
        assert "Traceback" not in self.out + self.err


class Client:
    """Starts `compress push` with a cache of its own and sees to it that no token is told."""

    def __init__(self, hub, home: Path) -> None:
        self._hub, self._home = hub, home

    def start(self, folder: Path, *options: str, token: str = "", endpoint: str = "", repo: str = REPO):
        environment = self._hub.environment(self._home, token)
        if endpoint:
            environment["HF_ENDPOINT"] = endpoint
        command = [sys.executable, "-m", "compress", "push", str(folder), repo, "--json", *options]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=self._home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __call__(self, folder: Path, *options: str, verify: bool = False, **settings: str) -> Pushed:
        started = time.monotonic()
        options = options if verify else (*options, "--no-verify-remote")
        process = self.start(folder, *options, **settings)
        out, err = process.communicate(timeout=300)
        for token in (self._hub.writer, self._hub.reader, self._hub.stranger, settings.get("token")):
            assert not token or token not in out + err
        assert (out + err).count("X-Amz-Signature=") == (out + err).count("X-Amz-Signature=***")
        return Pushed(process.returncode, out, err, time.monotonic() - started)


@pytest.fixture
def push(hub, tmp_path):
    """Return `push(folder, *options, verify=False, token=..., endpoint=..., repo=...) -> Pushed`."""
    home = tmp_path / "home"
    home.mkdir()
    yield Client(hub, home)
    assert hub.broken() == []
    assert "leaked" not in {one["token_name"] for one in hub.requests()}


def _sizes(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _uploads(hub, since: int = 0) -> list[dict]:
    found = hub.requests()[since:]
    return [one for one in found if one["method"] == "PUT" and one["path"].startswith("/uploads/")]


def _received(hub, since: int = 0) -> int:
    return sum(one["received_bytes"] for one in _uploads(hub, since))


def _asked(hub, method: str, end: str) -> list[dict]:
    return [one for one in hub.requests() if one["method"] == method and end in one["path"]]


def _large_bytes(hub, revision: str = "main") -> int:
    """Bytes of the files that a push sends to the storage."""
    files = hub.commits(REPO, revision)[0]["files"].values()
    return sum(file["size"] for file in files if file["lfs"])


def _holds(hub, folder: Path, revision: str = "main") -> None:
    """Hold the names, and the bytes of the weights, against the folder."""
    there = hub.commits(REPO, revision)[0]["files"]
    sizes = _sizes(folder)
    assert set(there) - {".gitattributes"} == set(sizes)
    for name, size in sizes.items():
        if name.endswith(".safetensors"):
            assert there[name]["size"] == size


def _nothing_sent(hub) -> None:
    assert not _uploads(hub)
    assert not [one for one in hub.requests() if "/commit/" in one["path"]]


def test_a_connection_cut_in_a_large_file_goes_on_where_it_was(hub, large, push, record_property):
    part, file = 16 * MIB, large / "whole" / WEIGHTS
    hub.configure(chunk_bytes=part)
    hub.fail("PUT", "/uploads/[0-9a-f]+/7$", cut_after=part // 2)
    hub.fail("GET", f"/objects/{_sha256(file)}", cut_after=100 * MIB)
    result = push(large / "whole", verify=True).result
    assert hub.faults_left() == []
    assert result["verified"] and result["private"] and hub.private(REPO)
    _holds(hub, large / "whole")
    assert len(hub.commits(REPO)) == 2
    again = _received(hub) - _large_bytes(hub)
    record_property("part_bytes", part)
    record_property("bytes_sent_again", again)
    assert part // 2 <= again < part
    # The cut part alone came twice.
    numbers = [one["path"].rpartition("/")[2] for one in _uploads(hub) if one["path"].count("/") == 3]
    assert sorted(numbers, key=int) == ["1", "2", "3", "4", "5", "6", "7", "7", *map(str, range(8, 14))]
    # The download that verifies went on too: it did not start again.
    fetched = _asked(hub, "GET", f"/objects/{_sha256(file)}")
    assert [one["status"] for one in fetched] == [None, 206]
    assert sum(one["sent_bytes"] for one in fetched) < file.stat().st_size + part


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def test_a_network_that_stays_away_ends_the_push_and_the_next_one_finishes_it(hub, large, push):
    hub.configure(chunk_bytes=16 * MIB)
    hub.fail("PUT", "/uploads/[0-9a-f]+/2$", cut_after=MIB, times=6)
    push(large / "shards").fails_with(WEIGHTS.partition(".")[0], "same command again")
    assert len(hub.commits(REPO)) == 1
    finished = hub.objects(REPO)
    since = len(hub.requests())
    assert push(large / "shards").result["up_to_date"] is False
    _holds(hub, large / "shards")
    assert _received(hub, since) == _large_bytes(hub) - sum(finished.values())


def test_a_push_that_was_killed_is_finished_by_the_next_one(hub, large, push):
    hub.configure(chunk_bytes=64 * MIB)  # every shard comes in one piece
    process = push.start(large / "shards", "--no-verify-remote")
    _wait(process, lambda: _large_objects(hub))
    hub.fail("PUT", "/uploads/", delay=30)  # the next one is not there when the process goes
    _wait(process, lambda: _uploads(hub)[-1]["status"] is None and not hub.faults_left())
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = hub.objects(REPO)
    assert len(hub.commits(REPO)) == 1 and 1 <= len(_large_objects(hub)) < 4
    since = len(hub.requests())
    assert push(large / "shards").result["files_sent"] == len(_sizes(large / "shards"))
    _holds(hub, large / "shards")
    assert _received(hub, since) == _large_bytes(hub) - sum(finished.values())
    assert len(hub.commits(REPO)) == 2


def _large_objects(hub) -> list[int]:
    return [size for size in (hub.objects(REPO) if hub.exists(REPO) else {}).values() if size > 40_000_000]


def _wait(process: subprocess.Popen, condition) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_too_many_requests_are_waited_for_as_long_as_asked(hub, small, push):
    for method, path in [
        ("POST", "/api/repos/create$"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch$"),
        ("PUT", "/uploads/"),
        ("POST", "/commit/main$"),
    ]:
        hub.fail(method, path, status=429, headers={"Retry-After": "2"})
    assert push(small).result["files_sent"] == len(_sizes(small))
    assert hub.faults_left() == []
    requests = hub.requests()
    refused = [one for one in requests if one["status"] == 429]
    assert len(refused) == 5
    for one in refused:
        again = [other for other in requests if other["path"] == one["path"] and other["status"] == 200]
        assert again[0]["started"] - one["started"] >= 2, one["path"]
    assert len(hub.commits(REPO)) == 2


def test_a_server_that_fails_three_times_is_asked_again(hub, small, push):
    paths = ["/api/repos/create$", "/refs$", "/uploads/", "/commit/main$"]
    for method, path in zip(["POST", "GET", "PUT", "POST"], paths, strict=True):
        hub.fail(method, path, status=500, times=3)
    assert push(small).result["files_sent"] == len(_sizes(small))
    assert hub.faults_left() == []
    assert [one["status"] for one in hub.requests()].count(500) == 3 * len(paths)
    assert len(hub.commits(REPO)) == 2
    _holds(hub, small)


def test_a_server_that_keeps_failing_ends_the_push_without_a_commit(hub, small, push):
    hub.fail("POST", "/commit/main$", status=503, times=100)
    pushed = push(small)
    pushed.fails_with("503", "org/model")
    assert len(hub.commits(REPO)) == 1
    assert len(_asked(hub, "POST", "/commit/main")) <= 8
    # What was uploaded stays, and is not sent again.
    hub.reset_faults()
    since = len(hub.requests())
    assert push(small).code == 0
    assert not _uploads(hub, since)


@pytest.mark.parametrize("exists", [True, False])
def test_a_token_that_may_only_read_is_refused_before_anything_is_sent(hub, small, push, exists):
    if exists:
        hub.create(REPO, private=True)
    push(small, token=hub.reader).fails_with("org/model", "write")
    _nothing_sent(hub)
    assert hub.exists(REPO) == exists


@pytest.mark.parametrize("private", [True, False, None])
def test_a_repository_of_others_is_refused_before_anything_is_sent(hub, small, push, private):
    if private is not None:
        hub.create(REPO, private=private)
    push(small, token=hub.stranger).fails_with("org/model", "403")
    _nothing_sent(hub)


def test_the_right_to_write_may_go_during_the_push(hub, small, push):
    hub.create(REPO)
    hub.fail("POST", "/commit/main$", status=403)
    push(small).fails_with("403", "write access")
    assert len(hub.commits(REPO)) == 1


def test_a_name_that_holds_something_else_is_refused_unless_told(hub, small, push):
    start = hub.create(REPO, {"model.safetensors": b"theirs", "README.md": b"# Theirs\n", "LICENSE": b"MIT"})
    push(small).fails_with("model.safetensors", "compress did not write", "--overwrite")
    _nothing_sent(hub)
    result = push(small, "--overwrite").result
    newest = hub.commits(REPO)[0]
    assert (newest["oid"], newest["parent"]) == (result["commit"], start)
    # A licence is nobody's to remove.
    assert set(newest["files"]) == {*_sizes(small), ".gitattributes", "LICENSE"}


@pytest.mark.parametrize("moment", [("POST", "/preupload/"), ("PUT", "/uploads/"), ("POST", "/commit/main$")])
def test_a_branch_that_moved_during_the_push_is_not_overwritten(hub, small, push, moment):
    hub.fail(*moment, hook="commit")
    push(small).fails_with("moved", "push again")
    assert hub.faults_left() == []
    theirs, first = hub.commits(REPO)
    assert theirs["author"] == "somebody" and set(theirs["files"]) == {*first["files"], "SOMEBODY.md"}
    since = len(hub.requests())
    result = push(small, "--overwrite").result
    assert not _uploads(hub, since)
    assert hub.commits(REPO)[0]["oid"] == result["commit"]
    assert hub.commits(REPO)[0]["parent"] == theirs["oid"]
    _holds(hub, small)


@pytest.mark.parametrize("fault", [{"hook": "lose answer"}, {"cut_after": 100}])
def test_a_commit_whose_answer_is_lost_is_made_once(hub, small, push, fault):
    hub.fail("POST", "/commit/main$", **fault)
    result = push(small, "--tag", "v1").result
    assert hub.faults_left() == []
    newest, _ = hub.commits(REPO)
    assert (result["commit"], result["tag"]) == (newest["oid"], "v1")
    assert hub.refs(REPO)["tags"] == {"v1": newest["oid"]}
    expected = 1 if "hook" in fault else 2
    assert len(_asked(hub, "POST", "/commit/main")) == expected


def test_a_pull_request_whose_answer_is_lost_is_opened_once(hub, small, push):
    hub.create(REPO)
    hub.fail("POST", "/commit/main$", hook="lose answer")
    result = push(small, "--create-pr").result
    assert hub.faults_left() == []
    assert hub.refs(REPO)["pull_requests"] == {"1": result["commit"]}
    assert result["pull_request"] == f"{hub.endpoint}/{REPO}/discussions/1"
    assert len(hub.commits(REPO)) == 1
    _holds(hub, small, "refs/pr/1")


def test_lost_answers_to_repository_branch_and_tag_do_no_harm(hub, small, push):
    for path in ("/api/repos/create$", "/branch/next$", "/tag/"):
        hub.fail("POST", path, hook="lose answer")
    result = push(small, "--revision", "next", "--tag", "v2").result
    assert hub.faults_left() == []
    refs = hub.refs(REPO)
    assert refs["branches"]["next"] == refs["tags"]["v2"] == result["commit"]
    assert len(hub.commits(REPO, "next")) == 2 and len(hub.commits(REPO)) == 1


def test_a_token_that_nobody_has_is_refused(hub, small, push):
    push(small, token="hf_" + "z" * 34).fails_with("401", "HF_TOKEN")
    _nothing_sent(hub)
    assert not hub.exists(REPO)


def test_an_endpoint_that_is_down_is_told_soon(hub, small, push):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pushed = push(small, endpoint=f"http://127.0.0.1:{port}")
    pushed.fails_with("cannot be reached", "HF_ENDPOINT")
    assert pushed.seconds < 30
    assert hub.requests() == []


def test_a_second_push_sends_and_commits_nothing(hub, small, push):
    first = push(small).result
    since = len(hub.requests())
    second = push(small).result
    assert second["up_to_date"] and second["commit"] == first["commit"]
    assert not _uploads(hub, since)
    assert len(hub.commits(REPO)) == 2
