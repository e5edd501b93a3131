"""Find a checkpoint that is to be verified: a folder, or a repository's files through the Hub's cache."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import SourceError, UsageError, VerifyError
from ..models.hub import fetch
from ..progress import Progress, SilentProgress
from ..runtime.hub_errors import translated
from .hub_transfer import heard_through
from .verify import MAX_REPORT_BYTES, REPORT_NAME, listed_files

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(\S+))?", re.ASCII)


@dataclass(frozen=True)
class Published:
    """A checkpoint on this disk.

    Attributes:
        name: what the user wrote, with the commit where it came from a repository.
        folder: where its files lie.
        repo: Hub id, None for a folder.
        commit: of the repository.
        files: names of all files of that commit; empty where they cannot be asked for (offline).
    """

    name: str
    folder: Path
    repo: str | None = None
    commit: str | None = None
    files: tuple[str, ...] = ()


def locate(target: str | Path, revision: str | None = None, progress: Progress | None = None) -> Published:
    """Return a folder as it is, or fetch the files that a repository's report lists.

    Args:
        target: a folder, `org/name` or `org/name@revision`; an existing folder goes first.
        revision: branch, tag or commit; in place of `@revision`.
        progress: told what the Hub's library has to say.

    Raises:
        SourceError: neither a folder nor the name of a repository, or nothing of ours is in it.
        UsageError: a revision of a folder was asked for, or two revisions.
        HubError: the Hub or the network refused.
    """
    text = str(target)
    if Path(target).is_dir():
        if revision is not None:
            raise UsageError(f"{text} is a folder: it has no revision", hint="leave --revision out")
        return Published(text, Path(target))
    found = _REPOSITORY.fullmatch(text)
    if found is None:
        hint = "give a folder that `compress run` wrote, or a repository as org/name or org/name@revision"
        raise SourceError(f"{text}: no such folder", hint=hint)
    repo, named = found.groups()
    if revision is not None and named is not None:
        raise UsageError(f"{text}: names a revision already", hint="leave --revision out")
    if revision is None and named is None and Path(text).parent.is_dir():
        beside = sorted(path.name for path in Path(text).parent.glob(f"{glob.escape(Path(text).name)}.*"))
        there = f"; {', '.join(beside)} is there" if beside else ""
        raise SourceError(
            f"{text}: no such folder in {Path(text).parent}{there}",
            hint=f"for the repository of this name on the Hub write {text}@main",
        )
    with heard_through(progress or SilentProgress()):
        return _fetch(repo, revision or named)


def _fetch(repo: str, revision: str | None) -> Published:
    shown = repo if revision is None else f"{repo}@{revision}"
    _check_size(repo, revision, shown)
    folder = fetch(repo, revision, [REPORT_NAME])
    commit = folder.name
    if not (folder / REPORT_NAME).is_file():
        raise SourceError(
            f"{shown}: holds no {REPORT_NAME}", hint="name a repository that `compress push` wrote"
        )
    try:
        names = [row["name"] for row in listed_files(folder)]
    except VerifyError as error:
        raise SourceError(f"{shown}: {error.message}") from None
    # As patterns, because the library fetches by them; what is no name in the repository matches nothing.
    fetch(repo, commit, [REPORT_NAME, *(glob.escape(name) for name in names)])
    return Published(f"{repo}@{commit}", folder, repo, commit, _files(repo, commit))


def _check_size(repo: str, revision: str | None, shown: str) -> None:
    """Refuse a report that is too long before it is fetched."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    with translated(shown):
        found = HfApi().get_paths_info(repo, [REPORT_NAME], revision=revision)
    for size in (getattr(entry, "size", 0) for entry in found):
        if size > MAX_REPORT_BYTES:
            raise SourceError(f"{shown}: {REPORT_NAME} has {size} bytes; at most {MAX_REPORT_BYTES} are read")


def _files(repo: str, commit: str) -> tuple[str, ...]:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return ()
    with translated(f"{repo}@{commit}"):
        return tuple(HfApi().list_repo_files(repo, revision=commit))
