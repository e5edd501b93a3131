"""Repositories in memory, bytes on disk under their SHA-256."""

from __future__ import annotations

import hashlib
import math
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .messages import HttpError

LARGE_SUFFIXES = ("bin", "ckpt", "gguf", "h5", "npy", "npz", "onnx", "pt", "pth", "safetensors", "zip")
GITATTRIBUTES = b"".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n".encode() for suffix in LARGE_SUFFIXES
)


@dataclass(frozen=True)
class Entry:
    """A file in a commit.

    Attributes:
        blob: git's name of it: SHA-1 of the blob, or of the pointer when `lfs`.
    """

    size: int
    sha256: str
    blob: str
    lfs: bool

    @property
    def oid(self) -> str:
        """The name that a client compares with: SHA-256 of a large file, else git's name."""
        return self.sha256 if self.lfs else self.blob

    def to_json(self, path: str) -> dict[str, object]:
        found: dict[str, object] = {"type": "file", "oid": self.blob, "size": self.size, "path": path}
        if self.lfs:
            pointer_size = len(_pointer(self.sha256, self.size))
            found["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return found


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_blob(data: bytes) -> str:
    """Return git's name of a file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large_entry(sha256: str, size: int) -> Entry:
    """Return the entry of a file that is kept as an object, a pointer standing for it in git."""
    return Entry(size, sha256, git_blob(_pointer(sha256, size)), True)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass
class PullRequest:
    number: int
    title: str
    author: str
    head: str
    base: str
    date: str
    description: str = ""
    status: str = "open"
    is_pull_request: bool = True
    merged_as: str | None = None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass
class Repository:
    """One model repository; `objects` are the large files that were uploaded to it and checked."""

    name: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    discussions: dict[int, PullRequest] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)
    created: str = field(default_factory=now)

    @property
    def namespace(self) -> str:
        return self.name.split("/")[0]

    def head(self, revision: str) -> str | None:
        """Return the commit that a branch, tag, pull request or (short) commit name stands for."""
        if found := self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(revision):
            return found
        for number, discussion in self.discussions.items():
            if revision == f"refs/pr/{number}" and discussion.is_pull_request:
                return discussion.head
        fits = [oid for oid in self.commits if len(revision) >= 7 and oid.startswith(revision)]
        return fits[0] if len(fits) == 1 else None

    def commit_of(self, revision: str) -> Commit:
        """Return the commit of a revision.

        Raises:
            HttpError: 404 when nothing has that name.
        """
        oid = self.head(revision)
        if oid is None:
            raise HttpError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commits from a revision back to the first one."""
        commit: Commit | None = self.commit_of(revision)
        while commit:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def add(
        self,
        files: dict[str, Entry],
        *,
        parent: str | None,
        title: str,
        description: str = "",
        author: str = "",
    ) -> Commit:
        """Record a commit with exactly `files`; no branch moves."""
        seed = f"{self.name} {len(self.commits)} {parent} {title} {sorted(files)} {now()}"
        oid = hashlib.sha1(seed.encode()).hexdigest()
        commit = Commit(oid, parent, title, description, author, now(), dict(sorted(files.items())))
        self.commits[oid] = commit
        return commit


@dataclass
class Upload:
    """An upload that was allowed: to whom it belongs, what is expected, which parts arrived."""

    repository: Repository
    sha256: str
    size: int
    part_bytes: int
    parts: dict[int, str] = field(default_factory=dict)

    @property
    def part_count(self) -> int:
        return math.ceil(self.size / self.part_bytes)


class Store:
    """All repositories, and the bytes of all files, under one lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.repositories: dict[str, Repository] = {}
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self.repositories.clear()
            for name in ("objects", "uploads"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir(parents=True)

    def object_path(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256

    def part_path(self, upload: str, part: int) -> Path:
        return self.folder / "uploads" / f"{upload}.{part}"

    def keep(self, data: bytes) -> Entry:
        """Store the bytes of a small file."""
        sha256 = hashlib.sha256(data).hexdigest()
        self.object_path(sha256).write_bytes(data)
        return Entry(len(data), sha256, git_blob(data), False)

    def keep_object(
        self, repository: Repository, sha256: str, size: int, parts: Iterable[Path]
    ) -> str | None:
        """Join uploaded parts into an object, if bytes and size are the promised ones.

        Returns:
            None, or what is wrong.
        """
        digest, total, paths = hashlib.sha256(), 0, list(parts)
        joined = paths[0].with_suffix(".joined")
        with joined.open("wb") as target:
            for path in paths:
                with path.open("rb") as source:
                    while piece := source.read(1 << 20):
                        digest.update(piece)
                        total += len(piece)
                        target.write(piece)
        for path in paths:
            path.unlink()
        if (digest.hexdigest(), total) != (sha256, size):
            joined.unlink()
            return f"got {total} bytes with SHA-256 {digest.hexdigest()}, expected {size} bytes with {sha256}"
        with self.lock:
            joined.replace(self.object_path(sha256))
            repository.objects[sha256] = size
        return None

    def create(self, name: str, *, private: bool, author: str) -> Repository:
        """Make a repository with its first commit, as the Hub does."""
        repository = Repository(name, private)
        files = {".gitattributes": self.keep(GITATTRIBUTES)}
        repository.branches["main"] = repository.add(
            files, parent=None, title="initial commit", author=author
        ).oid
        self.repositories[name] = repository
        return repository
