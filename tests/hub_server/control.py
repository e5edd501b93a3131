"""The back door: a test tells the server to fail, and looks at what it holds; needs the control secret."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .content import check_path, file_changes
from .faults import Fault, Faults
from .messages import HttpError
from .routing import Site
from .store import Entry, Repository


def _is(file: Path, entry: Entry) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest() == entry.sha256


class Control:
    """What a test may call; every public method is a command, its arguments come as JSON."""

    def __init__(self, site: Site, faults: Faults) -> None:
        self._site, self._faults = site, faults

    def call(self, command: str, arguments: dict[str, Any]) -> Any:
        """Carry out a command."""
        method = getattr(self, command, None)
        if command.startswith("_") or command == "call" or method is None:
            raise HttpError(404, f"no command {command!r}")
        with self._site.store.lock:
            return method(**arguments)

    def _repository(self, repo: str) -> Repository:
        if repo not in self._site.store.repositories:
            raise HttpError(404, f"no repository {repo}")
        return self._site.store.repositories[repo]

    def reset(self) -> None:
        self._faults.clear()
        self._site.uploads.clear()
        self._site.settings.restore()
        self._site.store.clear()

    def configure(self, **settings: int) -> None:
        for key, value in settings.items():
            if key not in asdict(self._site.settings):
                raise HttpError(400, f"no setting {key!r}")
            setattr(self._site.settings, key, value)

    def fail(self, **fault: Any) -> None:
        self._faults.add(Fault(**fault))

    def reset_faults(self) -> None:
        self._faults.forget()

    def faults_left(self) -> list[dict[str, Any]]:
        return self._faults.left()

    def requests(self) -> list[dict[str, Any]]:
        return self._faults.records()

    def exists(self, repo: str) -> bool:
        return repo in self._site.store.repositories

    def private(self, repo: str) -> bool:
        return self._repository(repo).private

    def objects(self, repo: str) -> dict[str, int]:
        return dict(self._repository(repo).objects)

    def refs(self, repo: str) -> dict[str, Any]:
        found = self._repository(repo)
        pulls = {key: pull.head for key, pull in found.discussions.items() if pull.is_pull_request}
        return {"branches": found.branches, "tags": found.tags, "pull_requests": pulls}

    def commits(self, repo: str, revision: str) -> list[dict[str, Any]]:
        """Return the history, newest first."""
        return [
            {
                "oid": commit.oid, "parent": commit.parent, "title": commit.title,
                "description": commit.description, "author": commit.author,
                "files": {
                    path: {"size": entry.size, "sha256": entry.sha256, "lfs": entry.lfs}
                    for path, entry in commit.files.items()
                },
            }
            for commit in self._repository(repo).history(revision)
        ]  # fmt: skip

    def broken(self) -> list[str]:
        """Read every file that any commit names; return those that are absent or not as named."""
        found, good = [], set()
        for repository in self._site.store.repositories.values():
            for commit in repository.commits.values():
                for path, entry in commit.files.items():
                    file = self._site.store.object_path(entry.sha256)
                    if entry not in good and not _is(file, entry):
                        found.append(f"{repository.name}@{commit.oid}: {path}")
                    good.add(entry)
        return found

    def read(self, repo: str, path: str, revision: str) -> str:
        files = self._repository(repo).commit_of(revision).files
        if path not in files:
            raise HttpError(404, f"no file {path} in {repo} at {revision}")
        return base64.b64encode(self._site.store.object_path(files[path].sha256).read_bytes()).decode()

    def create(self, repo: str, files: dict[str, str], private: bool, author: str) -> str:
        if repo in self._site.store.repositories:
            raise HttpError(409, f"{repo} is already there")
        self._site.store.create(repo, private=private, author=author)
        return self.commit(repo, files, "main", author) if files else self._repository(repo).branches["main"]

    def commit(self, repo: str, files: dict[str, str], revision: str, author: str) -> str:
        """Commit as somebody else would; a missing branch is made."""
        repository = self._repository(repo)
        base = repository.commit_of(revision if repository.head(revision) else "main")
        changed = {
            check_path(path): self._site.store.keep(base64.b64decode(data)) for path, data in files.items()
        }
        return file_changes(repository, revision, base, changed, title="a commit by somebody", author=author)
