"""Pushes of a real folder to a Hub on loopback, with the library's real client in this process."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from pathlib import Path

import huggingface_hub
import pytest
from compress.errors import HubError, PlanError, SourceError, UsageError, VerifyError
from compress.exporters import hub as exporter
from compress.exporters import hub_remote, hub_repository, hub_transfer, published
from compress.exporters.verify import verify_folder
from compress.progress import SilentProgress
from compress.recipes.export import PushSettings
from compress.reproduction import read_origin
from compress.runtime.hashes import digest

REPO = "org/model"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Recorder(SilentProgress):
    """Remembers notes, and what every step advanced by."""

    def __init__(self):
        self.notes, self.warnings, self.units, self.details = [], [], [], []

    def warn(self, message):
        self.warnings.append(message)

    def note(self, message):
        self.notes.append(message)

    def advance(self, units=1, detail=""):
        self.units.append(units)
        self.details.append(detail)


def push(folder, progress=None, **settings):
    settings = {"repo": REPO, "verify_remote": False, **settings}
    return exporter.push_folder(
        folder, PushSettings.model_validate(settings), progress=progress or SilentProgress()
    )


def contents(folder):
    """Name -> SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def change(folder, write=None, remove=(), **export):
    """Change files of an exported folder together with its report, so that it verifies."""
    for name, data in (write or {}).items():
        (folder / name).write_bytes(data)
    for name in remove:
        (folder / name).unlink()
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").unlink()
    files = [
        {"name": name, "bytes": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in sorted(contents(folder).items())
    ]
    report["export"] |= {"files": files, **export}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")


def commits_by(hub, repo=REPO, revision="main"):
    """The commits but the one that a repository starts with."""
    return hub.commits(repo, revision)[:-1]


def writes(hub):
    """What was sent: addresses of requests that upload or commit."""
    return [
        (row["method"], row["path"])
        for row in hub.requests()
        if row["method"] == "PUT" or "/commit/" in row["path"]
    ]


def test_a_first_push_is_one_commit_that_says_what_made_it(at_hub, exported):
    before = contents(exported)
    result = push(exported)
    (made,) = commits_by(at_hub)
    assert result.commit == made["oid"]
    assert made["parent"] == at_hub.commits(REPO)[-1]["oid"]
    assert at_hub.private(REPO)
    report = json.loads(at_hub.read(REPO, "report.json"))
    assert made["title"].endswith("by rtn: 0.533 MB, format compress")
    assert digest(report["recipe"]) in made["description"]
    assert "compress 0.1.0" in made["description"]
    assert "- size_ratio <= 0.9: measured 0.6" in made["description"]
    sent = {name: file["sha256"] for name, file in made["files"].items() if name != ".gitattributes"}
    assert sent.keys() == before.keys()
    assert {name for name in sent if sent[name] != before[name]} == {"README.md", "report.json"}
    listed = {row["name"]: row["sha256"] for row in report["export"]["files"]}
    assert listed == {name: sha256 for name, sha256 in sent.items() if name != "report.json"}
    assert contents(exported) == before, "the user's folder was changed"
    assert list(exported.parent.iterdir()) == [exported], "something was left behind"
    assert result.to_json() == {
        "repo": REPO, "revision": "main", "commit": made["oid"], "url": f"{at_hub.endpoint}/{REPO}",
        "private": True, "tag": None, "pull_request": None, "files_sent": len(before),
        "up_to_date": False, "verified": False, "notes": [],
    }  # fmt: skip


def test_the_pushed_card_loads_from_the_hub(at_hub, exported, outputs_of):
    import compress
    import torch

    push(exported)
    card = at_hub.read(REPO, "README.md").decode()
    assert f'compress.load("{REPO}")' in card
    assert f'compress.load("{REPO}")' not in (exported / "README.md").read_text()
    assert torch.equal(outputs_of(compress.load(REPO)), outputs_of(compress.load(exported)))


def test_a_second_push_sends_and_commits_nothing(at_hub, exported):
    first = push(exported)
    sent = writes(at_hub)
    second = push(exported)
    assert writes(at_hub) == sent
    assert len(commits_by(at_hub)) == 1
    assert (second.commit, second.files_sent, second.up_to_date) == (first.commit, 0, True)


def test_a_changed_folder_sends_what_changed_and_removes_what_is_gone(at_hub, exported):
    change(exported, {"model-00001.safetensors": os.urandom(4096), "model-00002.safetensors": b"x" * 4096})
    push(exported)
    sent = len(writes(at_hub))
    change(exported, {"model-00003.safetensors": b"y" * 4096}, remove=["model-00001.safetensors"])
    result = push(exported)
    last, first = commits_by(at_hub)
    assert first["files"].keys() - last["files"].keys() == {"model-00001.safetensors"}
    assert last["files"].keys() - first["files"].keys() == {"model-00003.safetensors"}
    assert [method for method, _ in writes(at_hub)[sent:]] == ["PUT", "POST"]
    assert first["files"][WEIGHTS] == last["files"][WEIGHTS]
    changed = [name for name in last["files"] if last["files"][name] != first["files"].get(name)]
    assert result.files_sent == len(changed)
    assert not at_hub.broken()


def test_a_pull_request_leaves_the_branch_alone(at_hub, exported):
    result = push(exported, create_pr=True)
    assert not commits_by(at_hub)
    assert at_hub.refs(REPO)["pull_requests"] == {"1": result.commit}
    assert result.revision == "refs/pr/1"
    assert result.pull_request == f"{at_hub.endpoint}/{REPO}/discussions/1"
    assert "report.json" in at_hub.commits(REPO, "refs/pr/1")[0]["files"]


def test_a_branch_is_made_and_a_tag_set_once(at_hub, exported):
    first = push(exported, revision="candidate", tag="v1.0")
    refs = at_hub.refs(REPO)
    assert refs["branches"]["candidate"] == refs["tags"]["v1.0"] == first.commit
    assert not commits_by(at_hub), "the default branch was changed"
    assert first.url.endswith("/tree/candidate")
    assert 'revision="candidate"' in at_hub.read(REPO, "README.md", "candidate").decode()
    assert push(exported, revision="candidate", tag="v1.0").up_to_date
    change(exported, {"more.txt": b"more"})
    sent = writes(at_hub)
    with pytest.raises(HubError, match=r"the tag v1\.0 exists, on the commit"):
        push(exported, revision="candidate", tag="v1.0")
    assert writes(at_hub) == sent
    with pytest.raises(HubError, match=r"org/model@v1\.0: is a tag"):
        push(exported, revision="v1.0")


def test_who_sees_a_repository(at_hub, exported):
    assert not push(exported, private=False).private
    assert not at_hub.private(REPO)
    progress = Recorder()
    result = push(exported, progress)
    assert result.notes == ("the repository exists and stays public; only a new one would be private",)
    assert progress.warnings == [f"{REPO}: {result.notes[0]}"]
    assert exporter.check_access(PushSettings(repo=REPO)) == result.notes
    assert exporter.check_access(PushSettings(repo=REPO, private=False)) == ()
    sent = writes(at_hub)
    change(exported, {"more.txt": b"more"})
    with pytest.raises(HubError, match="is public, and `private: true` is asked for"):
        push(exported, private=True)
    assert writes(at_hub) == sent


@pytest.mark.parametrize("refuse", [push, lambda folder, **s: exporter.check_access(PushSettings(repo=REPO))])
def test_what_others_put_there_is_refused_by_name(at_hub, exported, refuse):
    at_hub.create(REPO, {"z.bin": b"z", "model.bin": b"m", "README.md": b"# mine", ".hidden": b""})
    with pytest.raises(HubError, match="org/model@main: holds model.bin, which compress did not write"):
        refuse(exported)
    assert not writes(at_hub)


def test_a_card_that_somebody_wrote_is_not_replaced(at_hub, exported):
    at_hub.create(REPO, {"README.md": b"---\nlicense: mit\n---\nhello there\n"})
    with pytest.raises(HubError, match=r"org/model@main: somebody has written or changed its README\.md"):
        push(exported)
    push(exported, overwrite=True)
    card = at_hub.read(REPO, "README.md")
    assert b"hello there" not in card
    at_hub.commit(REPO, {"README.md": card + b"a paragraph of mine\n"})
    change(exported, {"more.txt": b"more"})
    with pytest.raises(HubError, match="written or changed"):
        push(exported)


def test_overwrite_replaces_what_others_put_there(at_hub, exported):
    at_hub.create(REPO, {"model.bin": b"m", "README.md": b"# mine", ".hidden": b""})
    push(exported, overwrite=True)
    (made, *_) = at_hub.commits(REPO)
    assert "model.bin" not in made["files"]
    assert ".hidden" in made["files"]


def test_a_licence_in_the_repository_stays_and_is_listed(at_hub, exported, tmp_path):
    at_hub.create(REPO, {"LICENSE.md": b"mine", "README.md": b"---\nlicense: mit\n---\n"})
    first = push(exported)
    assert at_hub.read(REPO, "LICENSE.md") == b"mine"
    snapshot = huggingface_hub.HfApi().snapshot_download(REPO, cache_dir=tmp_path / "fresh")
    assert verify_folder(snapshot)["verified"]
    assert push(exported).commit == first.commit
    rows = {row["name"]: row for row in json.loads(at_hub.read(REPO, "report.json"))["export"]["files"]}
    assert [name for name, row in rows.items() if "kept" in row] == ["LICENSE.md"]
    assert read_origin(Path(snapshot)).files.keys() == rows.keys() - {"LICENSE.md"}, "no run writes it"
    (Path(snapshot) / "LICENSE.md").chmod(0o644)
    (Path(snapshot) / "LICENSE.md").write_bytes(b"ours")
    with pytest.raises(VerifyError, match=r"'LICENSE\.md'"):
        verify_folder(snapshot)


def test_only_a_licence_may_be_said_to_be_kept(exported):
    report = json.loads((exported / "report.json").read_text())
    for row in report["export"]["files"]:
        row["kept"] = True
    (exported / "report.json").write_text(json.dumps(report))
    assert WEIGHTS in read_origin(exported).files


def test_the_licence_of_an_earlier_result_goes_with_it(at_hub, exported):
    at_hub.create(REPO, {"NOTICE": b"theirs", "licence.txt": b"theirs"})
    change(exported, {"LICENSE": b"of the first source"})
    push(exported)
    change(exported, {"LICENSE.md": b"of the second source"}, remove=["LICENSE"])
    push(exported)
    texts = [name for name in at_hub.commits(REPO)[0]["files"] if name.lower().startswith(("lic", "not"))]
    assert sorted(texts) == ["LICENSE.md", "NOTICE", "licence.txt"]


def test_overwrite_leaves_every_kind_of_licence(at_hub, exported):
    at_hub.create(REPO, {"NOTICE.md": b"theirs", "LICENCE": b"theirs", "license_plates.safetensors": b"w"})
    with pytest.raises(HubError, match=r"holds license_plates\.safetensors, which compress did not write"):
        push(exported)
    push(exported, overwrite=True)
    files = at_hub.commits(REPO)[0]["files"]
    assert {"NOTICE.md", "LICENCE"} <= files.keys() and "license_plates.safetensors" not in files


def test_large_files_of_a_repository_are_not_read(at_hub, exported, monkeypatch):
    monkeypatch.setattr(hub_repository, "MAX_TEXT_BYTES", 8)
    monkeypatch.setattr(hub_repository, "MAX_REPORT_BYTES", 8)
    at_hub.create(REPO, {"report.json": b'{"export": 3}', "LICENSE": b"too long to keep"})
    with pytest.raises(HubError, match="holds LICENSE, which compress did not write"):
        push(exported)
    assert not [row for row in at_hub.requests() if "/resolve/" in row["path"]]


def test_a_report_that_is_none_of_ours_lists_nothing(at_hub, exported):
    at_hub.create(REPO, {"report.json": b'{"export": 3}'})
    with pytest.raises(HubError, match=r"holds report\.json, which compress did not write"):
        push(exported)


@pytest.mark.slow
def test_what_was_pushed_is_downloaded_and_run(at_hub, exported):
    progress = Recorder()
    result = push(exported, progress, verify_remote=True, tag="v1")
    assert result.verified
    assert at_hub.refs(REPO)["tags"] == {"v1": result.commit}
    assert list(exported.parent.iterdir()) == [exported], "the download was left behind"
    fetched = {row["path"] for row in at_hub.requests() if row["method"] == "GET"}
    assert f"/{REPO}/resolve/{result.commit}/report.json" in fetched


def test_a_damaged_download_names_the_commit_and_sets_no_tag(at_hub, exported):
    commit = push(exported).commit
    (made,) = commits_by(at_hub)
    (stored,) = Path(at_hub._process.args[-1]).rglob(made["files"][WEIGHTS]["sha256"])
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    with pytest.raises(VerifyError, match=rf"{REPO}@{commit}: .*{WEIGHTS}' has another SHA-256"):
        push(exported, verify_remote=True, tag="v1")
    assert at_hub.refs(REPO)["tags"] == {}
    assert list(exported.parent.iterdir()) == [exported]


def test_a_disk_without_room_for_the_download_is_known_first(at_hub, exported, monkeypatch):
    usage = hub_remote.shutil.disk_usage(exported)
    monkeypatch.setattr(hub_remote.shutil, "disk_usage", lambda _: usage._replace(free=10 << 20))
    with pytest.raises(PlanError, match="0.01 GB are free") as caught:
        push(exported, verify_remote=True)
    assert "--no-verify-remote" in caught.value.hint
    assert not at_hub.requests()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda report: report["gates"][0].update(passed=False), "the gate size_ratio of its report failed"),
        (lambda report: report["export"].update(verified=False), "was not verified"),
        (None, "this result was rejected"),
    ],
)
def test_what_was_not_accepted_is_refused_before_any_traffic(at_hub, exported, spoil, message):
    if spoil is None:
        exported = exported.rename(exported.with_name("dit-w8.rejected"))
    else:
        report = json.loads((exported / "report.json").read_text())
        spoil(report)
        (exported / "report.json").write_text(json.dumps(report))
    with pytest.raises(VerifyError, match=message) as caught:
        push(exported)
    assert caught.value.exit_code == 6
    assert not at_hub.requests()


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("model"),
        lambda report: report.update(stages=3),
        lambda report: report["export"].update(bytes="many"),
        lambda report: report["export"]["files"][0].pop("sha256"),
        lambda report: report["environment"].pop("versions"),
        lambda report: report["environment"].update(device="x"),
        lambda report: report["gates"][0].pop("expected"),
        lambda report: report.update(padding="x" * (16 << 20)),
    ],
)
def test_a_damaged_report_is_refused_before_any_traffic(at_hub, exported, damage):
    report = json.loads((exported / "report.json").read_text())
    damage(report)
    (exported / "report.json").write_text(json.dumps(report))
    with pytest.raises(SourceError, match=r"report\.json"):
        push(exported)
    assert not at_hub.requests()


def test_a_report_that_gives_no_card_is_not_pushed(at_hub, exported):
    report = json.loads((exported / "report.json").read_text())
    del report["model"]["class"]
    (exported / "report.json").write_text(json.dumps(report))
    with pytest.raises(SourceError, match=r"report\.json: is not the report of a run"):
        push(exported)
    assert not writes(at_hub)


def test_a_device_that_is_none(exported):
    report = json.loads((exported / "report.json").read_text())
    report["environment"]["device"] = "x"
    (exported / "report.json").write_text(json.dumps(report))
    with pytest.raises(SourceError, match=r"environment\.device 'x' is neither cpu nor cuda"):
        read_origin(exported)


def test_a_report_that_is_too_long_is_not_fetched(at_hub, monkeypatch):
    at_hub.create(REPO, {"report.json": b'{"export": {"files": []}}'})
    monkeypatch.setattr(published, "MAX_REPORT_BYTES", 8)
    with pytest.raises(SourceError, match=r"org/model: report\.json has 25 bytes; at most 8 are read"):
        published.locate(REPO)
    assert not [row for row in at_hub.requests() if "/resolve/" in row["path"]]


def test_a_token_in_a_file_is_not_pushed(at_hub, exported):
    token = "hf_" + "a1" * 17
    change(exported, {"recipe.yaml": f"# {token}\n{(exported / 'recipe.yaml').read_text()}".encode()})
    with pytest.raises(UsageError, match=r"(README\.md|recipe\.yaml) holds an access token") as caught:
        push(exported)
    assert token not in str(caught.value)
    assert not writes(at_hub)


def test_progress_counts_every_byte_of_a_large_file(at_hub, exported):
    at_hub.configure(chunk_bytes=4 << 20)
    change(exported, {"large.safetensors": os.urandom(10 << 20)})
    progress = Recorder()
    push(exported, progress)
    sizes = [row["size"] for name, row in commits_by(at_hub)[0]["files"].items() if name != ".gitattributes"]
    assert sum(progress.units) == sum(sizes)
    assert progress.details.count("large.safetensors") > 3


def test_a_commit_without_what_was_sent_is_named(at_hub, exported, monkeypatch):
    files = hub_repository.RemoteRepository.files

    def without_one(self, commit):
        """As where a .gitignore in the repository keeps a file out of the commit."""
        return {name: file for name, file in files(self, commit).items() if name != "recipe.yaml"}

    monkeypatch.setattr(hub_repository.RemoteRepository, "files", without_one)
    with pytest.raises(VerifyError, match=rf"{REPO}@[0-9a-f]{{40}}: recipe\.yaml in it is not"):
        push(exported)


def test_our_commit_below_that_of_somebody_else_is_found(at_hub, exported, monkeypatch):
    state, calls = hub_repository.RemoteRepository.state, []

    def meanwhile(self):
        calls.append(self)
        if len(calls) == 2:  # the look after the answer was lost
            at_hub.commit(REPO, {"SOMEBODY.md": b"hello"})
        return state(self)

    monkeypatch.setattr(hub_repository.RemoteRepository, "state", meanwhile)
    at_hub.fail("POST", "/commit/", hook="lose answer")
    result = push(exported)
    somebody, ours = commits_by(at_hub)
    assert "SOMEBODY.md" in somebody["files"]
    assert result.commit == ours["oid"]


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "there is no access token"),
        ("hf_" + "x" * 30, "the token is not accepted"),
        ("reader", "has the role `read`, which cannot write"),
        ("stranger", r"no member of org and so cannot create it \(403\)"),
    ],
)
def test_access_is_refused_with_the_right_that_is_missing(at_hub, monkeypatch, token, message):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", getattr(at_hub, token, token))
    with pytest.raises(HubError, match=message) as caught:
        exporter.check_access(PushSettings(repo=REPO))
    assert "HF_TOKEN" in caught.value.hint or "member of org" in caught.value.hint
    assert not writes(at_hub)
    assert not at_hub.exists(REPO)


def test_access_to_an_existing_repository_of_others(at_hub, monkeypatch):
    at_hub.create(REPO)
    monkeypatch.setenv("HF_TOKEN", at_hub.stranger)
    with pytest.raises(HubError, match=r"org/model: writing to it: not permitted \(403: .*namespace org"):
        exporter.check_access(PushSettings(repo=REPO))
    exporter.check_access(PushSettings(repo=REPO, create_pr=True))


def test_access_creates_nothing(at_hub):
    exporter.check_access(PushSettings(repo=REPO))
    assert not at_hub.exists(REPO)


def test_access_offline(at_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        exporter.check_access(PushSettings(repo=REPO))


def test_warnings_of_the_library_become_notes_and_others_pass(monkeypatch):
    shown, progress = [], Recorder()
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    with hub_transfer.heard_through(progress):
        warnings.warn_explicit("of the card", UserWarning, "lib/huggingface_hub/hf_api.py", 1)
        warnings.warn_explicit("of somebody else", UserWarning, "lib/other.py", 1)
    assert progress.notes == ["Hub: of the card"]
    assert shown == ["of somebody else"]


def test_the_library_is_heard_without_tokens_and_left_as_it_was(at_hub, exported):
    logger = logging.getLogger("huggingface_hub")
    handlers, bars = list(logger.handlers), huggingface_hub.utils.are_progress_bars_disabled()
    at_hub.fail("PUT", "/uploads/", status=500)
    progress = Recorder()
    push(exported, progress)
    heard = [note for note in progress.notes if note.startswith("Hub: HTTP Error 500")]
    assert len(heard) == 1
    assert "X-Amz-Signature=***" in heard[0]
    assert logger.handlers == handlers
    assert huggingface_hub.utils.are_progress_bars_disabled() == bars
