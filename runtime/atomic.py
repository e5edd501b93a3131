"""Files and folders that are whole or absent: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_MARK = ".partial-"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, then `folder` itself, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))


def temporary_beside(path: Path) -> Path:
    """Return an unused hidden name in `path`'s own folder, so that renaming is atomic."""
    return path.parent / f".{path.name}{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the body succeeds and vanishes when it fails.

    Raises:
        FileExistsError: `path` exists already when the body has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        commit_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit_folder(temporary: Path, path: Path) -> None:
    """Give a finished temporary folder its final name, durably."""
    if path.exists():
        raise FileExistsError(path)
    sync_tree(temporary)
    temporary.rename(path)
    _sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what the body writes there replaces `path` when it succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep_partials(folder: Path) -> None:
    """Remove what killed processes left behind in `folder`; names of living processes are kept."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if TEMPORARY_MARK not in entry.name:
            continue
        process = entry.name.split(TEMPORARY_MARK, 1)[1].split("-", 1)[0]
        if process.isdigit() and Path(f"/proc/{process}").exists() and int(process) != os.getpid():
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
