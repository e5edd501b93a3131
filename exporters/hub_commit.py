"""Upload of what changed, and the one commit that names it.

Large files go first, by the library's own path (Xet, or LFS in parts); the commit names them after all of
them are there, so a push that breaks off leaves nothing behind but uploads that the next one reuses.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ..errors import HubError
from ..progress import Progress, step
from ..runtime.hashes import digest
from ..runtime.hub_errors import status_of, translated
from ..version import __version__
from .hub_bundle import Bundle, PushedFile
from .hub_repository import Changes, Pushed, RemoteRepository, State, changes

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_LARGE_BYTES = 8 << 20


def commit(
    repository: RemoteRepository, state: State, bundle: Bundle, change: Changes, progress: Progress
) -> Pushed:
    """Upload what changed and commit it.

    Args:
        repository: to push to.
        state: what it holds; the commit is made on this head or not at all.
        bundle: what it is to hold.
        change: from the one to the other.
        progress: gets one step, in bytes.

    Raises:
        HubError: the Hub or the network refused, or somebody else's commit came first.
    """
    from huggingface_hub import CommitOperationDelete

    settings = repository.settings
    total = sum(file.size_bytes for file in change.added)
    with ExitStack() as opened, step(progress, f"upload to {settings.repo}", total):
        additions = [_Addition(file, opened) for file in change.added]
        for group in _groups(additions):
            with translated(f"{settings.repo}: uploading {_names(group)}"), _watching(group, progress):
                repository.api.preupload_lfs_files(
                    settings.repo,
                    [addition.operation for addition in group],
                    revision=repository.branch,
                    create_pr=settings.create_pr,
                    free_memory=False,
                )
        removals = [CommitOperationDelete(name, is_folder=False) for name in change.removed]
        operations = [*(addition.operation for addition in additions), *removals]
        return _commit(repository, state, bundle, operations)


def _commit(repository: RemoteRepository, state: State, bundle: Bundle, operations: list[Any]) -> Pushed:
    settings, api = repository.settings, repository.api
    pulls_before = _pull_requests(repository) if settings.create_pr else {}

    def send() -> Pushed:
        info = api.create_commit(
            settings.repo,
            operations,
            commit_message=settings.message or _message(bundle.document),
            commit_description=_description(bundle.document),
            revision=repository.branch,
            parent_commit=state.head,
            create_pr=settings.create_pr,
        )
        revision = info.pr_revision if settings.create_pr else None
        return Pushed(info.oid, revision or repository.branch, info.pr_url)

    def made() -> Pushed | None:
        """Find the commit whose answer was lost."""
        if settings.create_pr:
            return _new_pull_request(repository, bundle, pulls_before)
        head = repository.state().head
        if head is None or head == state.head:
            return None
        for made_since in repository.commits(head, until=state.head):
            if not changes(bundle, repository.files(made_since)):
                return Pushed(made_since, repository.branch)
        raise HubError(
            f"{settings.repo}@{repository.branch}: moved to {head[:12]} during the push; nothing of this"
            " push was committed",
            hint="look at that commit, then push again; what was uploaded is not sent again",
        )

    pushed: Pushed = repository.ask(f"committing to {repository.branch}", send, done=made)
    return pushed


def _pull_requests(repository: RemoteRepository) -> dict[str, str]:
    refs = repository.ask(
        "reading its pull requests",
        lambda: repository.api.list_repo_refs(repository.repo, include_pull_requests=True),
    )
    return {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}


def _new_pull_request(repository: RemoteRepository, bundle: Bundle, before: dict[str, str]) -> Pushed | None:
    for ref, head in _pull_requests(repository).items():
        if ref not in before and not changes(bundle, repository.files(head)):
            number = ref.rpartition("/")[2]
            url = f"{repository.api.endpoint}/{repository.repo}/discussions/{number}"
            return Pushed(head, ref, url)
    return None


def open_pull_request(repository: RemoteRepository, bundle: Bundle) -> Pushed | None:
    """Find an open pull request of this account that holds the bundle already.

    The card names the branch, so what is equal was meant for the same one.

    Raises:
        HubError: the Hub or the network refused.
    """
    from huggingface_hub.errors import HfHubHTTPError

    api, repo = repository.api, repository.repo

    def opened() -> list[int]:
        account = api.whoami()["name"]
        try:
            found = list(
                api.get_repo_discussions(
                    repo, author=account, discussion_type="pull_request", discussion_status="open"
                )
            )
        except HfHubHTTPError as error:
            if status_of(error) in (403, 404):  # switched off there; creating one says what is the matter
                return []
            raise
        return [one.num for one in found if one.author == account]

    mine = {f"refs/pr/{number}": number for number in repository.ask("reading its pull requests", opened)}
    for ref, head in _pull_requests(repository).items() if mine else ():
        if ref in mine and not changes(bundle, repository.files(head)):
            return Pushed(head, ref, f"{api.endpoint}/{repo}/discussions/{mine[ref]}")
    return None


class _Addition:
    """A file on its way: the library's operation, read through a watched stream where that tells bytes."""

    def __init__(self, file: PushedFile, opened: ExitStack) -> None:
        from huggingface_hub import CommitOperationAdd

        self.file, self.stream = file, None
        content: Any = file.content
        # Xet takes paths alone and reads them itself; over LFS the stream tells how far it is.
        if isinstance(content, Path) and file.size_bytes >= _LARGE_BYTES and not _xet():
            content = self.stream = opened.enter_context(_Watched(content))
        self.operation: CommitOperationAdd = CommitOperationAdd(file.name, content)


class _Watched(io.BufferedReader):
    """A file that tells how many bytes were read from it for the first time."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.tell_read: Callable[[int], None] | None = None
        self._furthest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, and tell."""
        data = super().read(size)
        place = self.tell()
        if self.tell_read is not None and place > self._furthest:
            self.tell_read(place - self._furthest)
            self._furthest = place
        return data


@contextmanager
def _watching(group: list[_Addition], progress: Progress) -> Iterator[None]:
    """Advance by what is read from watched files, by whole files for the others."""
    for addition in group:
        if addition.stream is not None:
            name = addition.file.name
            addition.stream.tell_read = lambda count, name=name: progress.advance(count, name)
    yield
    for addition in group:
        if addition.stream is None:
            progress.advance(addition.file.size_bytes, addition.file.name)
        else:
            addition.stream.tell_read = None


def _groups(additions: list[_Addition]) -> Iterator[list[_Addition]]:
    """Yield the small files together, then each large one alone, so that progress can name it."""
    small = [addition for addition in additions if addition.file.size_bytes < _LARGE_BYTES]
    if small:
        yield small
    yield from ([addition] for addition in additions if addition.file.size_bytes >= _LARGE_BYTES)


def _names(group: list[_Addition]) -> str:
    first = group[0].file.name
    return first if len(group) == 1 else f"{first} and {len(group) - 1} more"


def _xet() -> bool:
    """Return whether the library uploads by Xet."""
    from importlib.util import find_spec

    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


def _message(document: dict[str, Any]) -> str:
    """Say in one line what is pushed: model, size and methods."""
    model, export = document["model"], document["export"]
    methods = " + ".join(str(stage["method"]) for stage in document["stages"])
    size = f"{export['bytes'] / 1e6:.3g} MB" if export["bytes"] < 1e9 else f"{export['bytes'] / 1e9:.3g} GB"
    identifier = PurePath(str(model["id"]))  # a path of this machine says nothing to others
    name = identifier.name if identifier.is_absolute() else str(identifier)
    return f"{name} by {methods}: {size}, format {export['format']}"


def _description(document: dict[str, Any]) -> str:
    """Say what made it and what it was held against."""
    lines = [
        f"Recipe: sha256 {digest(document['recipe'])} (of `recipe` in report.json, as canonical JSON)",
        f"Made by: compress {document['environment']['versions'].get('compress', 'unknown')}",
        f"Pushed by: compress {__version__}",
    ]
    gates = [f"- {row['metric']} {row['expected']}: measured {row['measured']}" for row in document["gates"]]
    return "\n".join([*lines, *(["Gates:", *gates] if gates else ["Gates: none"])])
