"""Answers about discussions and pull requests."""

from __future__ import annotations

from typing import Any

from .messages import HttpError, Request, Response
from .routing import MODEL, Site, route
from .store import PullRequest, Repository, now

NUMBER = r"/discussions/(?P<number>\d+)"


def _told(repository: Repository, found: PullRequest) -> dict[str, Any]:
    return {
        "num": found.number, "title": found.title, "status": found.status, "createdAt": found.date,
        "author": {"name": found.author}, "isPullRequest": found.is_pull_request,
        "repo": {"name": repository.name, "type": "model"},
    }  # fmt: skip


def _find(repository: Repository, number: str) -> PullRequest:
    if int(number) not in repository.discussions:
        raise HttpError(404, "Discussion not found", code="EntryNotFound")
    return repository.discussions[int(number)]


@route("GET", MODEL + "/discussions")
def listing(site: Site, request: Request, name: str) -> Response:
    repository = site.repository(request, name)
    kind, status = (request.query.get(key, [""])[0] for key in ("type", "status"))
    with site.store.lock:
        found = [
            one
            for one in repository.discussions.values()
            if kind in ("", "all") or (kind == "pull_request") == one.is_pull_request
            if status in ("", "all") or (status == "open") == (one.status in ("open", "draft"))
        ]
        told = [_told(repository, one) for one in sorted(found, key=lambda one: -one.number)]
    return Response.of({"count": len(told), "start": 0, "discussions": told, "numClosedDiscussions": 0})


@route("POST", MODEL + "/discussions")
def start(site: Site, request: Request, name: str) -> Response:
    asked = request.json()
    repository = site.repository(request, name)
    if request.account is None:
        raise HttpError(401, "Invalid username or password.")
    with site.store.lock:
        number = len(repository.discussions) + 1
        is_pull = bool(asked.get("pullRequest"))
        repository.discussions[number] = PullRequest(
            number, str(asked["title"]), request.account.name, repository.branches["main"], "main", now(),
            str(asked.get("description", "")), "draft" if is_pull else "open", is_pull,
        )  # fmt: skip
    return Response.of({"num": number, "url": f"{request.endpoint}/{name}/discussions/{number}"})


@route("GET", MODEL + NUMBER)
def details(site: Site, request: Request, name: str, number: str) -> Response:
    repository = site.repository(request, name)
    with site.store.lock:
        found = _find(repository, number)
        told = _told(repository, found)
        comment = {
            "id": f"{found.number:024x}", "type": "comment", "createdAt": found.date,
            "author": {"name": found.author},
            "data": {"edited": False, "hidden": False, "latest": {"raw": found.description}},
        }  # fmt: skip
        told["events"] = [comment]
        if found.is_pull_request:
            told |= {"filesWithConflicts": [], "diff": "", "changes": {"base": f"refs/heads/{found.base}"}}
            if found.merged_as:
                told["changes"]["mergeCommitId"] = found.merged_as
    return Response.of(told)


@route("POST", MODEL + NUMBER + "/merge")
def merge(site: Site, request: Request, name: str, number: str) -> Response:
    repository = site.repository(request, name, write=True)
    with site.store.lock:
        found = _find(repository, number)
        if not found.is_pull_request or found.status not in ("open", "draft"):
            raise HttpError(400, "This is not an open pull request")
        source, target = repository.commits[found.head], repository.commit_of(found.base)
        title = f"{found.title} (#{number})"
        made = repository.add(
            {**target.files, **source.files}, parent=target.oid, title=title, author=found.author
        )
        repository.branches[found.base] = found.merged_as = made.oid
        found.status = "merged"
    return Response.of({})
