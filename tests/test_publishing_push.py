"""A run that ends on a Hub: what is pushed, in which order, and what is left when a push fails."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

RECIPE = """\
model: tiny-dit
calibration: {samples: 1, steps: 1}
stages:
  - rtn: {weight_bits: 8, weight_symmetric: false}
evaluate: {fidelity: {samples: 2, steps: 2}}
require: {sqnr_db: ">= 10"}
export:
  - {path: ours, push: org/ours}
  - {path: plain, format: dequantized, push: {repo: org/plain, tag: v1, revision: release}}
"""


@pytest.fixture
def place(tiny_dit, tmp_path):
    """The folder of a job: a recipe, and a model that says its licence."""
    (tiny_dit / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def compress(hub, place):
    """Call the command line as a process; return its exit code, its document, and its errors."""

    def call(*words, token=hub.writer):
        done = subprocess.run(
            [sys.executable, "-m", "compress", *words, "--json"],
            cwd=place, env=hub.environment(place / "home", token), timeout=900,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    return call


def _events(place):
    lines = (place / ".compress" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _writes(hub):
    return [row for row in hub.requests() if row["method"] != "GET" and "commit" in row["path"]]


def _is_pushed(hub, folder, repo, revision="main"):
    """Hold every file of a revision against the folder, byte by byte."""
    (commit, *_) = hub.commits(repo, revision)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(commit["files"]) - {".gitattributes"} == names
    return all(hub.read(repo, name, revision) == (folder / name).read_bytes() for name in names)


def test_two_variants_go_to_two_repositories(compress, hub, place):
    code, document, errors = compress("run", "recipe.yaml")
    assert code == 0, errors
    ours, plain = document["export"]
    assert (ours["push"]["repo"], ours["push"]["revision"], ours["push"]["verified"]) == (
        "org/ours", "main", True,
    )  # fmt: skip
    assert (plain["push"]["repo"], plain["push"]["revision"], plain["push"]["tag"]) == (
        "org/plain", "release", "v1",
    )  # fmt: skip
    for name, repo, revision, part in (
        ("ours", "org/ours", "main", ours),
        ("plain", "org/plain", "release", plain),
    ):
        assert _is_pushed(hub, place / name, repo, revision)
        assert hub.commits(repo, revision)[0]["oid"] == part["push"]["commit"] and hub.private(repo)
        own = json.loads((place / name / "report.json").read_text())["export"]
        assert "push" not in own
        assert own == {key: value for key, value in part.items() if key != "push"}
        assert f'("{repo}"' in (place / name / "README.md").read_text()
    assert hub.refs("org/plain")["tags"]["v1"] == plain["push"]["commit"]
    events = [event["event"] for event in _events(place)]
    assert events[-5:] == ["published", "published", "pushed", "pushed", "done"]

    code, found, errors = compress("run", "--reproduce", "org/ours")
    assert code == 0, errors
    assert found["reproduced"] is True and found["folder"] == f"org/ours@{ours['push']['commit']}"


def test_a_variant_that_fails_keeps_the_other_from_being_pushed(compress, hub, place):
    (place / "recipe.yaml").write_text(
        RECIPE.replace('sqnr_db: ">= 10"', 'max_abs_error: "<= 0", linear_bytes_ratio: ">= 0"')
    )
    code, document, errors = compress("run", "recipe.yaml")
    assert code == 6, errors
    assert document["error"]["message"] == "plain: linear_bytes_ratio is not measured, required >= 0"
    assert (place / "ours" / "report.json").is_file() and (place / "plain.rejected" / "report.json").is_file()
    assert not (place / "plain").exists()
    assert _writes(hub) == [] and not hub.exists("org/ours") and not hub.exists("org/plain")


def test_a_push_that_fails_leaves_the_folders_and_says_how_to_go_on(compress, hub, place):
    hub.fail("POST", r"/api/models/org/plain/commit/", times=50, status=403)
    code, document, errors = compress("run", "recipe.yaml")
    assert code == 7, errors
    assert _is_pushed(hub, place / "ours", "org/ours")
    error = document["error"]
    assert error["message"].startswith("plain is finished but was not pushed: ")
    command = error["hint"].rpartition(": ")[2]
    assert command == "compress push plain org/plain@release --tag v1"
    assert [event["event"] for event in _events(place)][-2:] == ["pushed", "push_failed"]

    hub.reset()
    code, document, errors = compress("run", "recipe.yaml")
    assert code == 2 and "compress push ours org/ours" in document["error"]["hint"]
    code, document, errors = compress(*shlex.split(command)[1:])
    assert code == 0, errors
    assert _is_pushed(hub, place / "plain", "org/plain", "release")


@pytest.mark.parametrize("name", ["reader", "stranger", None])
def test_who_may_not_push_learns_it_before_the_work(compress, hub, place, name):
    code, document, errors = compress("run", "recipe.yaml", token=name and getattr(hub, name))
    assert code == 7, errors
    assert document["error"]["message"].startswith("org/ours")
    assert not (place / ".compress").exists() and not (place / "ours").exists()
    assert _writes(hub) == []


def test_a_strict_run_with_a_warning_pushes_nothing(compress, hub, place):
    (place / "tiny-dit" / "README.md").unlink()
    code, document, errors = compress("run", "recipe.yaml", "--strict")
    assert code == 6, errors
    assert "warning under --strict" in document["error"]["message"]
    assert "licence is not known" in document["error"]["message"]
    assert not hub.exists("org/ours") and _writes(hub) == []
