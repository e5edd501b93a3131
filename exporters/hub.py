"""Pushing an exported folder to the Hub: one commit, which is downloaded and verified before it is tagged."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CompressError, HubError, InterruptedPush, StageError, VerifyError
from ..progress import Progress
from ..recipes.export import PushSettings
from ..recipes.secrets import without_user_info
from ..runtime.atomic import scratch_folder, sweep_partials
from .hub_access import check_access
from .hub_bundle import Bundle, bundle, read_report
from .hub_commit import commit, open_pull_request
from .hub_remote import check_room, verify_remote
from .hub_repository import MAIN, Changes, Pushed, RemoteRepository, State, changes, refuse_tag, visibility
from .hub_transfer import heard_through

__all__ = ["PushResult", "check_access", "push_folder"]


@dataclass(frozen=True)
class PushResult:
    """What a push did.

    Attributes:
        repo: `org/name`.
        revision: the branch, or the reference of the pull request.
        commit: that holds the folder.
        url: to look at it.
        private: who sees the repository: its members alone, or everybody.
        tag: that was set, or None.
        pull_request: its address, or None.
        files_sent: how many files the commit added or changed.
        up_to_date: everything was there already; no commit was made.
        verified: the commit was downloaded again, matched every hash, and was run wherever its format
            can be run here.
        notes: what could not be checked, and what is not as it was asked for.
    """

    repo: str
    revision: str
    commit: str
    url: str
    private: bool
    tag: str | None
    pull_request: str | None
    files_sent: int
    up_to_date: bool
    verified: bool
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report's form."""
        return {**asdict(self), "notes": list(self.notes)}


def push_folder(folder: Path, settings: PushSettings, *, progress: Progress) -> PushResult:
    """Push an exported folder in one commit, and verify what arrived.

    Files that the revision has already are not sent; files of an earlier push that the folder does not
    have are removed by the same commit. Where nothing changes no commit is made.

    Args:
        folder: exported and verified.
        settings: where it goes.
        progress: gets one step for the upload and one for the verification.

    Returns:
        What was done.

    Raises:
        SourceError: the folder holds no report.
        VerifyError: the report says that the result was not accepted, or what arrived is not what was
            sent; the message names the commit.
        PlanError: the download that verifies would not fit on the disk.
        HubError: the Hub or the network refused.
        StageError: the disk refused the download that verifies.
        InterruptedPush: somebody ended it after the commit.
        Where something had been committed by then, the error's `push` says what.
    """
    folder = Path(folder).resolve()
    document = read_report(folder)
    with heard_through(progress), _scratch(folder) as scratch:
        if settings.verify_remote:
            check_room(scratch, sum(row["bytes"] for row in document["export"]["files"]))
        repository = RemoteRepository(settings, progress)
        repository.create()
        private = repository.is_private()
        state = repository.state()
        repository.refuse_foreign(state, scratch / "before")
        listed = [row["name"] for row in document["export"]["files"]]
        sent = bundle(folder, settings, repository.kept(state, listed, scratch / "before"))
        change = changes(sent, state.files)
        _check_tag(settings, state, change)
        notes = visibility(settings, private)
        for note in notes:
            progress.warn(f"{settings.repo}: {note}")
        pushed, change = _push(repository, state, sent, change, progress)
        result = _result(repository, pushed, change, private, notes)
        with _told(result, "verified"):
            if change:
                _check_arrived(repository, pushed, sent)
            if settings.verify_remote:
                unchecked = verify_remote(repository, result.commit, sent, scratch / "after", progress)
                result = replace(result, verified=True, notes=(*notes, *unchecked))
        if settings.tag is not None:
            with _told(result, "tagged"):
                repository.tag(result.commit)
            result = replace(result, tag=settings.tag)
    return result


def _push(
    repository: RemoteRepository, state: State, sent: Bundle, change: Changes, progress: Progress
) -> tuple[Pushed, Changes]:
    """Commit what changes, if anything; an open pull request that says the same is taken instead."""
    repository.ensure_branch(state)
    if not change and state.head is not None:
        return Pushed(state.head, repository.branch), change
    found = open_pull_request(repository, sent) if repository.settings.create_pr else None
    if found is not None:
        return found, Changes()
    return commit(repository, state, sent, change, progress), change


def _check_arrived(repository: RemoteRepository, pushed: Pushed, sent: Bundle) -> None:
    left = changes(sent, repository.files(pushed.commit))
    if left:
        name = [*(file.name for file in left.added), *left.removed][0]
        raise VerifyError(
            f"{repository.repo}@{pushed.commit}: {name} in it is not as it was sent",
            hint="see whether a .gitignore in the repository names it; do not use this commit",
        )


@contextmanager
def _told(result: PushResult, wanted: str) -> Iterator[None]:
    """Let whatever ends the body say that the commit was made, and where it is.

    Raises:
        HubError, VerifyError: of the body.
        StageError: the disk refused.
        InterruptedPush: somebody ended it.
    """
    where = result.pull_request or result.url
    head = f"{result.repo}: pushed as {result.commit} ({where}), but not {wanted}"
    try:
        yield
    except CompressError as error:
        kind = type(error) if isinstance(error, HubError) else VerifyError
        raise kind(f"{head}: {error.message}", hint=error.hint, push=result.to_json()) from error
    except OSError as error:
        hint = "free some space, or see its permissions; nothing that arrived is sent again"
        told = f"{head}: {error.filename or 'the disk'}: {error.strerror or error}"
        raise StageError(told, hint=hint, push=result.to_json()) from error
    except KeyboardInterrupt as error:
        raise InterruptedPush(f"interrupted; {head}", push=result.to_json()) from error


def _check_tag(settings: PushSettings, state: State, change: Changes) -> None:
    """Refuse a tag that would have to move, before anything is sent."""
    there = state.tags.get(settings.tag or "")
    if there is not None and (change or there != state.head):
        refuse_tag(settings.repo, str(settings.tag), there)


def _result(
    repository: RemoteRepository, pushed: Pushed, change: Changes, private: bool, notes: tuple[str, ...]
) -> PushResult:
    settings = repository.settings
    place = f"{without_user_info(repository.api.endpoint)}/{settings.repo}"
    return PushResult(
        repo=settings.repo,
        revision=pushed.revision,
        commit=pushed.commit,
        url=place if pushed.revision == MAIN else f"{place}/tree/{pushed.revision}",
        private=private,
        tag=None,
        pull_request=None if pushed.pull_request is None else without_user_info(pushed.pull_request),
        files_sent=len(change.added),
        up_to_date=not change,
        verified=False,
        notes=notes,
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, or, where nothing can be written there, in the temporary one."""
    if not os.access(folder.parent, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="compress-push-") as name:
            yield Path(name)
        return
    sweep_partials(folder.parent, folder.name)
    with scratch_folder(folder) as scratch:
        yield scratch
