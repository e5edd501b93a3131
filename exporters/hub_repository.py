"""One repository on the Hub, as a push sees it: what is there, what has to change, one commit, one tag."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import HubError, SourceError, TagTakenError
from ..models.source_card import MAX_TEXT_BYTES, is_text_name
from ..progress import Progress
from ..recipes.export import PushSettings
from ..runtime.strict_json import parse_object
from ..version import __version__
from .hub_bundle import CARD_NAME, Bundle, PushedFile
from .hub_transfer import ATTEMPTS, attempt
from .verify import MAX_REPORT_BYTES, REPORT_NAME, is_kept

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MAIN = "main"
_FRONT_MATTER = re.compile(rb"\A---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class State:
    """What a revision holds.

    Attributes:
        head: its commit; None in a repository without one.
        exists: the branch is there; else `head` and `files` are those of the default branch.
        files: by name.
        tags: name -> commit.
    """

    head: str | None
    exists: bool
    files: Mapping[str, RepoFile]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Changes:
    """From what a revision holds to a bundle.

    Attributes:
        added: new or with other content.
        removed: names.
    """

    added: list[PushedFile] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


@dataclass(frozen=True)
class Pushed:
    """A commit.

    Attributes:
        commit: its hash.
        revision: branch, or the reference of the pull request.
        pull_request: its address, or None.
    """

    commit: str
    revision: str
    pull_request: str | None = None


class RemoteRepository:
    """The repository of a push, by the Hub's library.

    Args:
        settings: of the push.
        progress: told what is tried again.
        attempts: how often a request is made at most.
    """

    def __init__(self, settings: PushSettings, progress: Progress, *, attempts: int = ATTEMPTS) -> None:
        from huggingface_hub import HfApi

        self.api: HfApi = HfApi(library_name="compress", library_version=__version__)
        self.settings, self.repo, self.branch = settings, settings.repo, settings.revision or MAIN
        self._progress, self._attempts = progress, attempts

    def ask(self, action: str, call: Any, **options: Any) -> Any:
        """Make a call of the library; see `attempt`."""
        what = f"{self.repo}: {action}"
        return attempt(what, call, progress=self._progress, attempts=self._attempts, **options)

    def create(self) -> None:
        """Create the repository where it does not exist; who sees an existing one is not changed."""
        self.ask(
            "creating the repository",
            lambda: self.api.create_repo(self.repo, private=self.settings.private, exist_ok=True),
        )

    def is_private(self) -> bool:
        """Return who sees the repository: its members alone, or everybody.

        Raises:
            HubError: everybody, and `private: true` was asked for in so many words.
        """
        info = self.ask("reading the repository", lambda: self.api.model_info(self.repo))
        if not info.private and self.settings.private and "private" in self.settings.model_fields_set:
            raise HubError(
                f"{self.repo}: is public, and `private: true` is asked for",
                hint="make it private on its settings page, or take `private` out of the recipe",
            )
        return bool(info.private)

    def state(self) -> State:
        """Return what the revision holds now.

        Raises:
            HubError: `revision` names a tag.
        """
        refs = self.ask("reading its branches", lambda: self.api.list_repo_refs(self.repo))
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if self.branch not in branches and self.branch in tags:
            raise HubError(
                f"{self.repo}@{self.branch}: is a tag, which cannot be pushed to",
                hint="name a branch; a tag is set by --tag",
            )
        head = branches.get(self.branch, branches.get(MAIN))
        files = {} if head is None else self.files(head)
        return State(head, self.branch in branches, files, tags)

    def files(self, commit: str) -> dict[str, RepoFile]:
        """Return the files of a commit by name."""
        from huggingface_hub.hf_api import RepoFile

        listed: Iterable[Any] = self.ask(
            "listing its files",
            lambda: list(self.api.list_repo_tree(self.repo, revision=commit, recursive=True)),
        )
        return {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}

    def commits(self, head: str, *, until: str | None) -> list[str]:
        """Return the commits from `head` back to `until`, which is not among them; newest first."""
        found: list[Any] = self.ask(
            "reading its history", lambda: self.api.list_repo_commits(self.repo, revision=head)
        )
        return list(takewhile(lambda commit: commit != until, (entry.commit_id for entry in found)))

    def read(self, name: str, commit: str, scratch: Path) -> bytes:
        """Return a file of a commit whose size is known to be small."""
        path: str = self.ask(
            f"reading {name}",
            lambda: self.api.hf_hub_download(self.repo, name, revision=commit, cache_dir=scratch),
        )
        return Path(path).read_bytes()

    def ours(self, state: State, scratch: Path) -> Mapping[str, str]:
        """Return what an earlier push of ours wrote, by name: the SHA-256; of its report, nothing."""
        report = state.files.get(REPORT_NAME)
        if report is None or state.head is None or report.size > MAX_REPORT_BYTES:
            return {}
        return _listed(self.read(REPORT_NAME, state.head, scratch))

    def refuse_foreign(self, state: State, scratch: Path) -> None:
        """Refuse a revision with files that no push of ours put there, unless `overwrite`.

        Raises:
            HubError: naming one of them.
        """
        if self.settings.overwrite or state.head is None:
            return
        ours = self.ours(state, scratch)
        others = state.files.keys() - {CARD_NAME} - ours.keys()
        foreign = [name for name in others if not name.startswith(".") and not _is_licence(state.files[name])]
        if foreign:
            raise HubError(
                f"{self.repo}@{self.branch}: holds {min(foreign)}, which compress did not write",
                hint="push to another repository or --revision, or replace what is there with --overwrite",
            )
        if CARD_NAME in state.files and self._is_written_by_hand(state, ours.get(CARD_NAME), scratch):
            raise HubError(
                f"{self.repo}@{self.branch}: somebody has written or changed its {CARD_NAME}",
                hint="keep that text elsewhere and push with --overwrite, or push to another --revision",
            )

    def _is_written_by_hand(self, state: State, recorded: str | None, scratch: Path) -> bool:
        """Return whether the card has a text that is not the one of the push before this one.

        The Hub's own form for a new repository makes a card of metadata alone: nobody wrote that.
        """
        assert state.head is not None
        if state.files[CARD_NAME].size > MAX_TEXT_BYTES:
            return True
        content = self.read(CARD_NAME, state.head, scratch)
        if hashlib.sha256(content).hexdigest() == recorded:
            return False
        return bool(_FRONT_MATTER.sub(b"", content).strip())

    def kept(self, state: State, names: Iterable[str], scratch: Path) -> dict[str, bytes]:
        """Return the repository's own licence files that are not among `names`: a push leaves them.

        What an earlier push of ours brought along is not the repository's own: it goes with its result.
        """
        licences = {name for name, file in state.files.items() if _is_licence(file)} - set(names)
        if not licences:
            return {}
        own = sorted(licences - self.ours(state, scratch).keys())
        return {name: self.read(name, state.head or self.branch, scratch) for name in own}

    def ensure_branch(self, state: State) -> None:
        """Make the branch from the default branch where it does not exist."""
        if state.exists or self.branch == MAIN:
            return
        self.ask(
            f"creating the branch {self.branch}",
            lambda: self.api.create_branch(self.repo, branch=self.branch, revision=state.head, exist_ok=True),
        )

    def tag(self, commit: str) -> None:
        """Put the tag on a commit; nothing where it is there already."""
        tag = self.settings.tag
        assert tag is not None

        def tagged() -> bool | None:
            refs = self.api.list_repo_refs(self.repo)
            found = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
            if found is not None and found != commit:
                refuse_tag(self.repo, tag, found)
            return True if found else None

        def create() -> bool:
            self.api.create_tag(self.repo, tag=tag, revision=commit)
            return True

        self.ask(f"setting the tag {tag}", lambda: tagged() or create(), done=tagged)


def visibility(settings: PushSettings, private: bool) -> tuple[str, ...]:
    """Say that an existing repository is seen by others than a new one would be."""
    if private == settings.private:
        return ()
    now, new = ("private", "public") if private else ("public", "private")
    return (f"the repository exists and stays {now}; only a new one would be {new}",)


def refuse_tag(repo: str, tag: str, commit: str) -> NoReturn:
    """Refuse to move a tag."""
    raise TagTakenError(
        f"{repo}: the tag {tag} exists, on the commit {commit[:12]}",
        hint="choose another --tag: what was released under one is not replaced",
    )


def _is_licence(file: RepoFile) -> bool:
    """Return whether a file is a licence or notice text, by the rule for those of a source."""
    return is_text_name(file.path) and file.size <= MAX_TEXT_BYTES


def changes(bundle: Bundle, files: Mapping[str, RepoFile]) -> Changes:
    """Return what has to change so that a revision with `files` holds the bundle and nothing else.

    Hidden files (.gitattributes) belong to the Hub and stay.
    """
    added = [file for file in bundle.files.values() if not _same(file, files.get(file.name))]
    removed = [name for name in files if name not in bundle.files and not name.startswith(".")]
    return Changes(added, sorted(removed))


def _same(file: PushedFile, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != file.size_bytes:
        return False
    return remote.lfs.sha256 == file.sha256 if remote.lfs else remote.blob_id == file.git_oid


def _listed(content: bytes) -> dict[str, str]:
    """Return what a push wrote, by its report: name and SHA-256; none where that is not one of ours."""
    try:
        rows = parse_object(content, REPORT_NAME)["export"]["files"]
        listed = {str(row["name"]): str(row["sha256"]) for row in rows if not is_kept(row)}
    except (SourceError, KeyError, TypeError, AttributeError):
        return {}
    return {**listed, REPORT_NAME: ""}
