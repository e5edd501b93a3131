"""By what data on disk are known again: by content, or very much of them by when they changed. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable

HASHED_BYTES = 2**30
"""Data up to this size count by the content of all files; larger ones by names, sizes and times."""


def count_by_content(sizes: Iterable[int]) -> bool:
    """Tell whether data count by the content of their files, whose sizes are given in bytes."""
    return sum(sizes) <= HASHED_BYTES


def version_of(stat: os.stat_result) -> list[int]:
    """Return what a file counts by that is not read: its bytes, and the time of its last change."""
    return [stat.st_size, stat.st_mtime_ns]
