"""Answers about files: what to upload how, commit, list, read."""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from urllib.parse import quote

from .messages import HttpError, Request, Response
from .routing import MODEL, REPOSITORY, REVISION, Site, require_write, route
from .store import GITATTRIBUTES, Commit, Entry, PullRequest, Repository, large_entry, now

LARGE_BYTES = 10 << 20
LARGE_PATTERNS = [line.split()[0].decode() for line in GITATTRIBUTES.splitlines()]


def check_path(path: object) -> str:
    """Refuse a path that leaves the repository or touches git's own folder."""
    parts = path.split("/") if isinstance(path, str) else [""]
    if any(part in ("", ".", "..", ".git") or "\\" in part or "\0" in part for part in parts):
        raise HttpError(400, f"Invalid path in a commit: {path!r}")
    return "/".join(parts)


def _is_large(path: str, size: int, sample: bytes) -> bool:
    by_name = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LARGE_PATTERNS)
    return by_name or size >= LARGE_BYTES or b"\0" in sample


@route("POST", MODEL + f"/preupload/{REVISION}")
def preupload(site: Site, request: Request, name: str, revision: str) -> Response:
    asked = request.json()
    repository = site.repository(request, name, write=not request.flag("create_pr"))
    ignored = [line for line in str(asked.get("gitIgnore", "")).splitlines() if line and line[0] != "#"]
    with site.store.lock:
        present = repository.commit_of(revision).files
    files = []
    for file in asked["files"]:
        path, entry = check_path(file["path"]), present.get(file["path"])
        large = _is_large(path, file["size"], base64.b64decode(file.get("sample", "")))
        told: dict[str, object] = {
            "path": path, "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
        }  # fmt: skip
        if entry:
            told["oid"] = entry.oid
        files.append(told)
    return Response.of({"files": files})


def _operations(body: bytes) -> list[tuple[str, dict[str, object]]]:
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        found = [(line["key"], dict(line["value"])) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise HttpError(400, f"The body of a commit has one operation per line: {error!r}") from error
    if not found or found[0][0] != "header" or not found[0][1].get("summary"):
        raise HttpError(400, "A commit starts with its header, and has a summary")
    return found


def _stored_object(repository: Repository, path: str, value: dict[str, object]) -> Entry:
    """Return the entry of a large file, which must have been uploaded to this repository."""
    oid, size = str(value.get("oid")), value.get("size")
    stored = repository.objects.get(oid)
    if stored is None or size not in (None, stored):
        message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        raise HttpError(400, f"{message} Offending file: {path}")
    return large_entry(oid, stored)


def _changed(
    site: Site, repository: Repository, files: dict[str, Entry], key: str, value: dict[str, object]
) -> None:
    """Apply one operation of a commit to `files`."""
    path = check_path(str(value.get("path")).rstrip("/") if key.startswith("deleted") else value.get("path"))
    if key == "file":
        data = base64.b64decode(str(value["content"]), validate=True)
        if len(data) >= LARGE_BYTES:
            raise HttpError(400, f"{path} has {len(data)} bytes: upload it as a large file")
        files[path] = site.store.keep(data)
    elif key == "lfsFile":
        files[path] = _stored_object(repository, path, value)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HttpError(404, f"A file with this name doesn't exist: {path}", code="EntryNotFound")
    elif key == "deletedFolder":
        inside = [other for other in files if other.startswith(path + "/")]
        if not inside:
            raise HttpError(404, f"A folder with this name doesn't exist: {path}", code="EntryNotFound")
        for other in inside:
            del files[other]
    else:
        raise HttpError(400, f"unknown operation {key!r}")


def _check_tree(files: dict[str, Entry]) -> None:
    for path in files:
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if "/".join(parents[:depth]) in files:
                raise HttpError(400, f"{'/'.join(parents[:depth])} would be a file and a folder")


def _advance(repository: Repository, revision: str, oid: str) -> None:
    if match := re.fullmatch(r"refs/pr/(\d+)", revision):
        repository.discussions[int(match[1])].head = oid
    else:
        repository.branches[revision.removeprefix("refs/heads/")] = oid


def file_changes(
    repository: Repository, revision: str, base: Commit, changed: dict[str, Entry], *, title: str, author: str
) -> str:
    """Add files to a branch, past all checks; return the commit."""
    made = repository.add({**base.files, **changed}, parent=base.oid, title=title, author=author)
    _advance(repository, revision, made.oid)
    return made.oid


@route("POST", MODEL + f"/commit/{REVISION}")
def commit(site: Site, request: Request, name: str, revision: str) -> Response:
    opens = request.flag("create_pr")
    repository = site.repository(request, name)
    if request.account is None or not opens:
        require_write(request.account, repository.namespace)
    assert request.account
    (_, header), *operations = _operations(request.body.read())
    with site.store.lock:
        base = repository.commit_of(revision)
        if not opens and revision in repository.tags or revision in repository.commits:
            raise HttpError(400, f"{revision} is not a branch")
        parent = header.get("parentCommit")
        if parent and not (base.oid == parent or (opens and parent in repository.commits)):
            raise HttpError(412, "A commit has happened since. Please refresh and try again.")
        base = repository.commits[str(parent)] if parent else base
        files = dict(base.files)
        for key, value in operations:
            _changed(site, repository, files, key, value)
        _check_tree(files)
        title, description = str(header["summary"]), str(header.get("description", ""))
        author = request.account.name
        made = repository.add(files, parent=base.oid, title=title, description=description, author=author)
        number = len(repository.discussions) + 1
        if opens:
            pull = PullRequest(number, title, author, made.oid, revision, now(), description)
            repository.discussions[number] = pull
        else:
            _advance(repository, revision, made.oid)
    url = f"{request.endpoint}/{name}"
    told = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    return Response.of(told | ({"pullRequestUrl": f"{url}/discussions/{number}"} if opens else {}))


def _folders(files: dict[str, Entry]) -> set[str]:
    return {path[:at] for path in files for at, letter in enumerate(path) if letter == "/"}


def _described(found: Commit, path: str, *, expand: bool) -> dict[str, object]:
    entry = found.files.get(path)
    told = entry.to_json(path) if entry else {"type": "directory", "oid": found.oid, "size": 0, "path": path}
    if expand:
        told["lastCommit"] = {"id": found.oid, "title": found.title, "date": found.date}
    return told


@route("GET", MODEL + f"/tree/{REVISION}(/(?P<folder>.+))?")
def tree(site: Site, request: Request, name: str, revision: str, folder: str) -> Response:
    repository = site.repository(request, name)
    with site.store.lock:
        found = repository.commit_of(revision)
    folders = _folders(found.files)
    if folder and folder not in folders:
        raise HttpError(404, f'{folder} does not exist on "{revision}"', code="EntryNotFound")
    prefix = folder + "/" if folder else ""
    paths = sorted(path for path in {*found.files, *folders} if path.startswith(prefix))
    if not request.flag("recursive"):
        paths = [path for path in paths if "/" not in path[len(prefix) :]]
    start, page = int(request.query.get("cursor", ["0"])[0]), site.settings.page_entries
    told = [_described(found, path, expand=request.flag("expand")) for path in paths[start : start + page]]
    headers = {}
    if start + page < len(paths):
        flags = "".join(f"&{key}={request.flag(key)}" for key in ("recursive", "expand"))
        headers["Link"] = f'<{request.endpoint}{request.path}?cursor={start + page}{flags}>; rel="next"'
    return Response.of(told, headers=headers)


@route("POST", MODEL + f"/paths-info/{REVISION}")
def paths_info(site: Site, request: Request, name: str, revision: str) -> Response:
    asked = request.form()
    repository = site.repository(request, name)
    with site.store.lock:
        found = repository.commit_of(revision)
    known = {*found.files, *_folders(found.files)}
    expand = asked.get("expand", ["false"])[0].lower() == "true"
    return Response.of(
        [_described(found, path, expand=expand) for path in asked.get("paths", []) if path in known]
    )


@route("HEAD", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
@route("GET", f"/{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
def resolve(site: Site, request: Request, name: str, revision: str, path: str) -> Response:
    repository = site.repository(request, name)
    with site.store.lock:
        found = repository.commit_of(revision)
    entry, headers = found.files.get(path), {"X-Repo-Commit": found.oid}
    if entry is None:
        raise HttpError(404, "Entry not found", code="EntryNotFound", headers=headers)
    if entry.lfs:
        # A large file lies on the storage, another host: its address carries a signature.
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        location = f"{request.storage}{site.signer.sign('GET', '/objects/' + entry.sha256)}"
        return Response(302, {**headers, "Location": location})
    headers |= {"ETag": f'"{entry.blob}"', "Content-Disposition": f"inline; filename*=UTF-8''{quote(path)}"}
    return file_response(site, request, entry.sha256, entry.size, headers)


def file_response(site: Site, request: Request, sha256: str, size: int, headers: dict[str, str]) -> Response:
    """Send a stored file, or the part that `Range` asks for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    file, asked = site.store.object_path(sha256), request.headers.get("Range")
    if asked is None:
        return Response(200, headers, file=file, length=size)
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    first, last = (int(match[1]), int(match[2] or size - 1)) if match else (size, size)
    if first >= size or last < first:
        raise HttpError(416, f"Range not satisfiable: {asked}", headers={"Content-Range": f"bytes */{size}"})
    last = min(last, size - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Response(206, headers, file=file, start=first, length=last - first + 1)
