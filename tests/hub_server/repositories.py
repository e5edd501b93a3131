"""Answers about repositories: who am I, create, describe, branches, tags, history."""

from __future__ import annotations

import re

from .messages import HttpError, Request, Response
from .routing import MODEL, REVISION, Site, require_write, route
from .store import Repository


@route("GET", "/api/whoami-v2")
def whoami(site: Site, request: Request) -> Response:
    if request.account is None:
        raise HttpError(401, "Invalid username or password.")
    return Response.of(request.account.to_json())


@route("POST", "/api/repos/create")
def create(site: Site, request: Request) -> Response:
    asked = request.json()
    if request.account is None:
        raise HttpError(401, "Invalid username or password.")
    namespace = asked.get("organization") or request.account.name
    name = f"{namespace}/{asked.get('name')}"
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) or asked.get("type", "model") != "model":
        raise HttpError(400, f"Invalid repo name or type: {name}")
    try:
        require_write(request.account, namespace)
    except HttpError as error:
        message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        raise HttpError(error.status, message) from error
    with site.store.lock:
        url = f"{request.endpoint}/{name}"
        if name in site.store.repositories:
            raise HttpError(409, "You already created this model repo", url=url)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        site.store.create(name, private=private, author=request.account.name)
    return Response.of({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete(site: Site, request: Request) -> Response:
    asked = request.json()
    account = request.account
    name = f"{asked.get('organization') or (account.name if account else '')}/{asked.get('name')}"
    with site.store.lock:
        del site.store.repositories[site.repository(request, name, write=True).name]
    return Response()


def _information(repository: Repository, revision: str, *, blobs: bool) -> dict[str, object]:
    commit = repository.commit_of(revision)
    siblings: list[dict[str, object]] = []
    for path, entry in commit.files.items():
        sibling: dict[str, object] = {"rfilename": path}
        if blobs:
            told = entry.to_json(path)
            sibling |= {"size": entry.size, "blobId": entry.blob}
            if entry.lfs:
                pointer_size = told["lfs"]["pointerSize"]  # type: ignore[index]
                sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": pointer_size}
        siblings.append(sibling)
    return {
        "_id": commit.oid[:24], "id": repository.name, "modelId": repository.name,
        "author": repository.namespace,
        "sha": commit.oid, "private": repository.private, "gated": False, "disabled": False, "tags": [],
        "downloads": 0, "likes": 0, "siblings": siblings, "createdAt": repository.created,
        "lastModified": commit.date, "usedStorage": sum(repository.objects.values()),
    }  # fmt: skip


@route("GET", MODEL + f"(/revision/{REVISION})?")
def information(site: Site, request: Request, name: str, revision: str) -> Response:
    repository = site.repository(request, name)
    with site.store.lock:
        return Response.of(_information(repository, revision or "main", blobs=request.flag("blobs")))


@route("GET", MODEL + "/auth-check(?P<write>/write)?")
def auth_check(site: Site, request: Request, name: str, write: str) -> Response:
    site.repository(request, name, write=bool(write))
    return Response()


@route("GET", MODEL + "/refs")
def references(site: Site, request: Request, name: str) -> Response:
    repository = site.repository(request, name)

    def told(kind: str, found: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": oid} for key, oid in found.items()]

    with site.store.lock:
        answer = {"branches": told("heads", repository.branches), "tags": told("tags", repository.tags)}
        pulls = {str(key): pull.head for key, pull in repository.discussions.items() if pull.is_pull_request}
        if request.flag("include_prs"):
            answer["pullRequests"] = told("pr", pulls)
    return Response.of({"converts": [], **answer})


@route("GET", MODEL + f"/commits/{REVISION}")
def history(site: Site, request: Request, name: str, revision: str) -> Response:
    repository = site.repository(request, name)
    with site.store.lock:
        commits = list(repository.history(revision))
    return Response.of(
        [
            {
                "id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for commit in commits
        ]
    )  # fmt: skip


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[\w.+/-]{1,200}", name) or ".." in name or name.startswith(("/", "-")):
        raise HttpError(400, f"Invalid reference name: {name}")


@route("POST", MODEL + "/branch/(?P<branch>[^/]+)")
def create_branch(site: Site, request: Request, name: str, branch: str) -> Response:
    asked = request.json()
    repository = site.repository(request, name, write=True)
    _check_name(branch)
    with site.store.lock:
        if branch in repository.branches:
            raise HttpError(409, f"Reference already exists: refs/heads/{branch}")
        repository.branches[branch] = repository.commit_of(asked.get("startingPoint") or "main").oid
    return Response.of({}, status=201)


@route("DELETE", MODEL + "/branch/(?P<branch>[^/]+)")
def delete_branch(site: Site, request: Request, name: str, branch: str) -> Response:
    repository = site.repository(request, name, write=True)
    with site.store.lock:
        if branch == "main":
            raise HttpError(403, "Cannot delete the branch main")
        if repository.branches.pop(branch, None) is None:
            raise HttpError(404, f"Reference does not exist: {branch}", code="RevisionNotFound")
    return Response()


@route("POST", MODEL + f"/tag/{REVISION}")
def create_tag(site: Site, request: Request, name: str, revision: str) -> Response:
    asked = request.json()
    repository = site.repository(request, name, write=True)
    tag = str(asked.get("tag"))
    _check_name(tag)
    with site.store.lock:
        target = repository.commit_of(revision)
        if tag in repository.tags:
            raise HttpError(409, f"Tag reference exists already: refs/tags/{tag}")
        repository.tags[tag] = target.oid
    return Response.of({}, status=201)


@route("DELETE", MODEL + "/tag/(?P<tag>[^/]+)")
def delete_tag(site: Site, request: Request, name: str, tag: str) -> Response:
    repository = site.repository(request, name, write=True)
    with site.store.lock:
        if repository.tags.pop(tag, None) is None:
            raise HttpError(404, f"Tag does not exist: {tag}", code="RevisionNotFound")
    return Response()
