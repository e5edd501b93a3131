"""Files and folders that are whole or absent: written under a temporary name, fsynced, renamed.

A temporary folder is locked while its process lives, so that what a killed process left behind can be
told from what a living one is writing, also from another container on the same disk.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.partial-(?P<process>\d+)-[0-9a-f]{8}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    return path.parent / f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty, hidden, locked folder beside `path`; gone afterwards unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder that is there against others who ask for the same, and wait for those who hold it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` when the body succeeds and vanishes when it fails.

    Raises:
        FileExistsError: `path` exists already when the body has ended.
    """
    with scratch_folder(path) as temporary:
        yield temporary
        commit_folder(temporary, path)


def commit_folder(temporary: Path, path: Path) -> None:
    """Give a finished temporary folder its final name, durably.

    Raises:
        FileExistsError: the name is taken.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(path)
    sync_tree(temporary)
    temporary.rename(path)
    _sync(path.parent)


def replace_folder(temporary: Path, path: Path) -> None:
    """Put a finished temporary folder in the place of another one, then remove that one.

    The new folder is durable before the old one loses its name. Where the system can exchange two
    names at once, `path` exists at every moment; elsewhere it is absent between two renames.
    """
    sync_tree(temporary)
    if not _exchange(temporary, path):
        aside = temporary_beside(path)
        path.rename(aside)
        temporary.rename(path)
        temporary = aside
    _sync(path.parent)
    shutil.rmtree(temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    done: int = renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return done == 0


def remove_folder(folder: Path) -> None:
    """Remove a folder so that at no moment a part of it stands under its name."""
    aside = temporary_beside(folder)
    folder.rename(aside)
    shutil.rmtree(aside)


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


def sweep_partials(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left behind in `folder`; what living ones write is kept.

    Args:
        folder: to look in, not below.
        name: only temporary names for this final name are ours; None: for any, in folders where
            nobody but us writes.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or (name is not None and found["name"] != name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            if not _is_locked(entry):
                shutil.rmtree(entry, ignore_errors=True)
        elif not _is_alive(int(found["process"])):
            entry.unlink(missing_ok=True)


def _is_locked(folder: Path) -> bool:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, as another user
        return True
    return True
