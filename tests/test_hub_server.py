"""The test Hub against the real client: what `huggingface_hub` does with it, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

MIB = 1 << 20
REPO = "org/model"


@pytest.fixture
def api(hub, monkeypatch):
    """Return `api(token)`: the real client, uploading by LFS as it does without Xet."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return lambda token=hub.writer: huggingface_hub.HfApi(endpoint=hub.endpoint, token=token)


@pytest.fixture
def folder(tmp_path):
    """A folder with a card, a config, a small and a large file of weights."""
    made = tmp_path / "folder"
    (made / "scheduler").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# A model\n")
    (made / "scheduler" / "config.json").write_text("{}")
    (made / "small.safetensors").write_bytes(bytes(range(256)) * 40)
    block = hashlib.sha256(b"large").digest() * (MIB // 32)
    (made / "large.safetensors").write_bytes(b"".join(bytes([n]) + block[1:] for n in range(5)) + b"end")
    return made


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _uploads(hub):
    return [one for one in hub.requests() if one["path"].startswith("/uploads/") and one["method"] == "PUT"]


def _status(error):
    return error.value.response.status_code


def test_create_upload_and_download_in_a_fresh_cache(hub, api, folder, tmp_path):
    from huggingface_hub import snapshot_download

    hub.configure(chunk_bytes=MIB)
    assert api().whoami()["name"] == "wanda"
    url = api().create_repo(REPO, private=True)
    assert url == f"{hub.endpoint}/{REPO}" and hub.private(REPO)
    made = api().upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    newest, oldest = hub.commits(REPO)
    assert (made.oid, newest["parent"], newest["title"]) == (newest["oid"], oldest["oid"], "first")
    for path in folder.rglob("*.*"):
        name = path.relative_to(folder).as_posix()
        assert newest["files"][name]["sha256"] == _sha256(path)
        assert hub.read(REPO, name) == path.read_bytes()
    assert newest["files"]["large.safetensors"]["lfs"] and not newest["files"]["README.md"]["lfs"]
    assert hub.broken() == []
    # 5 MiB and 3 bytes come as 6 parts; the small file as one.
    sizes = sorted(one["received_bytes"] for one in _uploads(hub))
    assert sizes == [3, 256 * 40, MIB, MIB, MIB, MIB, MIB]

    got = snapshot_download(
        REPO,
        endpoint=hub.endpoint,
        token=hub.reader,
        cache_dir=tmp_path / "cache",
        local_dir=tmp_path / "got",
    )
    for path in folder.rglob("*.*"):
        assert _sha256(tmp_path / "got" / path.relative_to(folder)) == _sha256(path)
    assert got == str(tmp_path / "got")
    # A token goes to the Hub, never to the storage.
    assert {one["token_name"] for one in hub.requests() if one["host"] == "storage"} == {None}
    assert {one["token_name"] for one in hub.requests() if one["host"] == "hub"} <= {"writer", "reader", None}


def test_a_second_upload_sends_nothing_again(hub, api, folder):
    api().create_repo(REPO)
    first = api().upload_folder(repo_id=REPO, folder_path=folder)
    before = len(_uploads(hub))
    assert api().upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    (folder / "small.safetensors").write_bytes(b"changed")
    api().upload_folder(repo_id=REPO, folder_path=folder)
    assert [one["received_bytes"] for one in _uploads(hub)[before:]] == [len(b"changed")]
    assert len(hub.commits(REPO)) == 3


def test_listing_in_pages(hub, api, folder):
    hub.configure(page_entries=2)
    hub.create(REPO, {f"folder/{n}.txt": str(n).encode() for n in range(5)})
    tree = {one.path: one for one in api().list_repo_tree(REPO, recursive=True)}
    assert list(tree) == [".gitattributes", "folder", *(f"folder/{n}.txt" for n in range(5))]
    assert tree["folder/3.txt"].blob_id == hashlib.sha1(b"blob 1\x003").hexdigest()
    assert [one.path for one in api().list_repo_tree(REPO)] == [".gitattributes", "folder"]
    assert len(list(api().list_repo_tree(REPO, "folder", expand=True))) == 5
    assert [one.size for one in api().get_paths_info(REPO, ["folder/1.txt", "absent"])] == [1]
    assert len(api().model_info(REPO, files_metadata=True).siblings) == 6
    assert api().list_repo_commits(REPO)[0].title == "a commit by somebody"


def test_branches_tags_and_pull_requests(hub, api):
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    api().create_repo(REPO)
    start = hub.commits(REPO)[0]["oid"]
    api().create_branch(REPO, branch="next/one")
    with pytest.raises(HfHubHTTPError) as error:
        api().create_branch(REPO, branch="next/one")
    assert _status(error) == 409
    add = lambda text: [CommitOperationAdd("a.txt", text)]  # noqa: E731
    made = api().create_commit(REPO, add(b"1"), commit_message="m", revision="next/one", parent_commit=start)
    with pytest.raises(HfHubHTTPError) as error:
        api().create_commit(REPO, add(b"2"), commit_message="m", revision="next/one", parent_commit=start)
    assert _status(error) == 412
    assert hub.refs(REPO)["branches"] == {"main": start, "next/one": made.oid}

    api().create_tag(REPO, tag="v1", revision="next/one")
    with pytest.raises(HfHubHTTPError) as error:
        api().create_tag(REPO, tag="v1")
    assert _status(error) == 409
    assert hub.read(REPO, "a.txt", "v1") == b"1"

    pull = api(hub.reader).create_commit(REPO, add(b"3"), commit_message="asks", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    api().create_commit(REPO, add(b"4"), commit_message="more", revision="refs/pr/1")
    assert hub.read(REPO, "a.txt", "refs/pr/1") == b"4"
    assert "a.txt" not in hub.commits(REPO)[0]["files"]
    refs = api().list_repo_refs(REPO, include_pull_requests=True)
    assert [one.ref for one in refs.pull_requests] == ["refs/pr/1"]
    api().merge_pull_request(REPO, 1)
    assert hub.read(REPO, "a.txt") == b"4"
    assert api().get_discussion_details(REPO, 1).status == "merged"


def test_who_may_do_what(hub, api):
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub.create(REPO, {"a.txt": b"a"}, private=True)
    hub.create("org/open")
    api(hub.reader).auth_check(REPO)
    for token in (hub.stranger, False):
        for repo in (REPO, "org/absent"):
            with pytest.raises(RepositoryNotFoundError):
                api(token).model_info(repo)
    assert api(False).model_info("org/open").private is False
    with pytest.raises(RevisionNotFoundError):
        api().model_info(REPO, revision="absent")
    with pytest.raises(EntryNotFoundError):
        api().hf_hub_download(REPO, "absent.txt")
    for act in (lambda api: api.whoami(), lambda api: api.model_info("org/open")):
        with pytest.raises(HfHubHTTPError) as error:
            act(api("hf_unknown"))
        assert _status(error) == 401
    for token, repo in ((hub.reader, REPO), (hub.stranger, "org/open")):
        for act in (
            lambda api, repo: api.upload_file(path_or_fileobj=b"1", path_in_repo="b.txt", repo_id=repo),
            lambda api, repo: api.create_branch(repo, branch="b"),
            lambda api, repo: api.create_tag(repo, tag="t"),
            lambda api, repo: api.create_repo("org/new"),
            lambda api, repo: api.auth_check(repo, write=True),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                act(api(token), repo)
            assert _status(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        api().create_repo(REPO)
    assert _status(error) == 409
    assert api().create_repo(REPO, exist_ok=True) == f"{hub.endpoint}/{REPO}"


def test_a_bad_card_is_refused_before_anything_is_sent(hub, api, folder):
    (folder / "README.md").write_text("---\nbase_model: ./here\n---\n")
    api().create_repo(REPO)
    with pytest.raises(ValueError, match="base_model"):
        api().upload_folder(repo_id=REPO, folder_path=folder)
    assert len(hub.commits(REPO)) == 1 and not _uploads(hub)


def _post(hub, path, body, method="POST", headers=None, host=None):
    """Send a request that the real client would not; return status and text."""
    headers = {"Authorization": f"Bearer {hub.writer}"} if headers is None else headers
    request = urllib.request.Request((host or hub.endpoint) + path, body, headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _lines(*operations):
    header = ("header", {"summary": "s", "description": ""})
    return b"".join(json.dumps({"key": k, "value": v}).encode() + b"\n" for k, v in (header, *operations))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (("lfsFile", {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 5}), "does not exist"),
        (("lfsFile", {"path": "w", "algo": "sha256", "oid": "0" * 64}), "does not exist"),
        (("file", {"path": "../w", "content": "", "encoding": "base64"}), "Invalid path"),
        (("file", {"path": "/w", "content": "", "encoding": "base64"}), "Invalid path"),
        (("file", {"path": "a/.git/config", "content": "", "encoding": "base64"}), "Invalid path"),
        (("file", {"path": ".gitattributes/b", "content": "", "encoding": "base64"}), "a file and a folder"),
        (("deletedFile", {"path": "absent"}), "doesn't exist"),
        (("moved", {"path": "absent"}), "unknown operation"),
    ],
)
def test_commits_that_cannot_be_are_refused(hub, operation, message):
    hub.create(REPO)
    status, text = _post(hub, f"/api/models/{REPO}/commit/main", _lines(operation))
    assert status in (400, 404) and message in text
    assert len(hub.commits(REPO)) == 1


def _batch(hub, data, *, oid=None):
    asked = {"oid": oid or hashlib.sha256(data).hexdigest(), "size": len(data)}
    body = {"operation": "upload", "transfers": ["basic"], "objects": [asked], "hash_algo": "sha256"}
    status, text = _post(hub, f"/{REPO}.git/info/lfs/objects/batch", json.dumps(body).encode())
    assert status == 200
    return json.loads(text)["objects"][0].get("actions")


def test_bytes_that_are_not_the_promised_ones_are_refused(hub):
    hub.create(REPO)
    address = _batch(hub, b"right")["upload"]["href"]
    path = address.removeprefix(hub.storage)
    for data in (b"wrong", b"short"[:3], b"right and more"):
        status, _ = _post(hub, path, data, "PUT", {}, hub.storage)
        assert status == 400
    assert not hub.objects(REPO)
    assert _post(hub, path, b"right", "PUT", {}, hub.storage)[0] == 200
    assert hub.objects(REPO) == {hashlib.sha256(b"right").hexdigest(): 5}
    assert _batch(hub, b"right") is None
    # An object of one repository is no object of another.
    hub.create("org/other")
    pointer = {"path": "w", "algo": "sha256", "oid": hashlib.sha256(b"right").hexdigest(), "size": 5}
    right, too_long = _lines(("lfsFile", pointer)), _lines(("lfsFile", {**pointer, "size": 6}))
    assert _post(hub, "/api/models/org/other/commit/main", right)[0] == 400
    assert _post(hub, f"/api/models/{REPO}/commit/main", too_long)[0] == 400
    assert _post(hub, f"/api/models/{REPO}/commit/main", right)[0] == 200


def test_parts_that_are_missing_or_others_are_refused(hub):
    hub.configure(chunk_bytes=4)
    hub.create(REPO)
    upload = _batch(hub, b"0123456789")["upload"]
    paths = {key: href.removeprefix(hub.storage) for key, href in upload["header"].items() if key.isdigit()}
    assert sorted(paths) == ["1", "2", "3"] and upload["header"]["chunk_size"] == "4"

    def complete(etags, oid=None):
        parts = [{"partNumber": number, "etag": etag} for number, etag in etags.items()]
        body = {"oid": oid or hashlib.sha256(b"0123456789").hexdigest(), "parts": parts}
        path = upload["href"].removeprefix(hub.storage)
        return _post(hub, path, json.dumps(body).encode(), headers={}, host=hub.storage)

    etags = {n: f'"{hashlib.md5(b"0123456789"[4 * n - 4 : 4 * n]).hexdigest()}"' for n in (1, 2, 3)}
    for number, data in (("1", b"0123"), ("3", b"89")):
        assert _post(hub, paths[number], data, "PUT", {}, hub.storage)[0] == 200
    assert complete(etags)[0] == 400  # the second part has not come
    assert _post(hub, paths["3"], b"longer", "PUT", {}, hub.storage)[0] == 400
    assert _post(hub, paths["2"], b"4567", "PUT", {}, hub.storage)[0] == 200
    assert complete({**etags, 2: etags[1]})[0] == 400
    assert complete({1: etags[1], 2: etags[2]})[0] == 400
    assert complete(etags, oid="0" * 64)[0] == 400
    assert not hub.objects(REPO)
    assert complete(etags)[0] == 200
    assert complete(etags)[0] == 200  # asked again, because the answer was lost
    assert list(hub.objects(REPO).values()) == [10]


def test_the_storage_wants_its_signature_and_no_token(hub):
    hub.create(REPO)
    address = _batch(hub, b"right")["upload"]["href"]
    path = address.removeprefix(hub.storage)
    token = {"Authorization": f"Bearer {hub.writer}"}
    forged = path.replace("X-Amz-Signature=", "X-Amz-Signature=0")
    assert _post(hub, forged, b"right", "PUT", {}, hub.storage)[0] == 403
    assert _post(hub, path.partition("?")[0], b"right", "PUT", {}, hub.storage)[0] == 403
    assert _post(hub, path, b"right", "PUT", token, hub.storage)[0] == 400
    assert hub.requests()[-1]["token_name"] == "leaked"
    assert _post(hub, path, b"right", "PUT", {})[0] == 404
    assert not hub.objects(REPO)
    assert _post(hub, "/_control/reset", b"", headers={"X-Control-Secret": "guess"})[0] == 403
    assert hub.exists(REPO)


def test_a_cut_upload_goes_on_with_the_same_part(hub, api, folder):
    hub.configure(chunk_bytes=2 * MIB)
    api().create_repo(REPO)
    hub.fail("PUT", "/uploads/.*/2$", cut_after=MIB)
    api().upload_folder(repo_id=REPO, folder_path=folder, allow_patterns=["large*"])
    assert not hub.faults_left()
    parts = [(one["path"][-1], one["status"]) for one in _uploads(hub)]
    assert parts == [("1", 200), ("2", None), ("2", 200), ("3", 200)]
    cut = _uploads(hub)[1]["received_bytes"]
    assert MIB <= cut < 2 * MIB
    assert hub.read(REPO, "large.safetensors") == (folder / "large.safetensors").read_bytes()


def test_a_cut_download_goes_on_where_it_was(hub, api, folder, tmp_path):
    file = folder / "large.safetensors"
    file.write_bytes(file.read_bytes() * 4)
    api().create_repo(REPO)
    api().upload_folder(repo_id=REPO, folder_path=folder)
    hub.fail("GET", "/objects/", cut_after=15 * MIB)
    got = api().hf_hub_download(REPO, file.name, cache_dir=tmp_path / "cache")
    assert _sha256(Path(got)) == _sha256(file)
    first, second = (one for one in hub.requests() if one["path"].startswith("/objects/"))
    assert (first["status"], second["status"]) == (None, 206)
    assert first["sent_bytes"] == 15 * MIB
    # The client writes what it got in pieces of 10 MiB, and asks for the rest.
    assert second["sent_bytes"] == file.stat().st_size - 10 * MIB


def test_faults_are_met_in_order_and_only_as_often_as_told(hub, api):
    from huggingface_hub.errors import HfHubHTTPError

    hub.create(REPO)
    hub.fail("GET", "/api/models/org", status=500)
    hub.fail("GET", "/api/models/org", status=429, headers={"Retry-After": "7"}, times=1)
    for status in (500, 429):
        with pytest.raises(HfHubHTTPError) as error:
            api().model_info(REPO)
        assert _status(error) == status
    assert error.value.response.headers["Retry-After"] == "7"
    assert api().model_info(REPO).id == REPO
    hub.fail("POST", "/create$", delay=0.3, times=2)
    api().create_repo("org/two")
    assert hub.requests()[-1]["seconds"] >= 0.3
    assert [fault["times"] for fault in hub.faults_left()] == [1]
    hub.reset()
    assert hub.faults_left() == [] and not hub.exists(REPO)


def test_somebody_commits_and_a_lost_answer(hub, api):
    import httpx2
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError

    add = [CommitOperationAdd("a.txt", b"1")]
    start = hub.create(REPO)
    hub.fail("POST", "/commit/", hook="commit")
    with pytest.raises(HfHubHTTPError) as error:
        api().create_commit(REPO, add, commit_message="m", parent_commit=start)
    assert _status(error) == 412
    assert [one["author"] for one in hub.commits(REPO)][0] == "somebody"
    hub.fail("POST", "/commit/", hook="lose answer")
    with pytest.raises(httpx2.NetworkError):
        api().create_commit(REPO, [CommitOperationAdd("a.txt", b"1")], commit_message="mine")
    assert hub.commits(REPO)[0]["title"] == "mine"
