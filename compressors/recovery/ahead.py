"""The next batch is made while the one before is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


def one_ahead(make: Callable[[K], V], keys: Iterable[K]) -> Generator[tuple[K, V], None, None]:
    """Yield (key, make(key)) in order; a thread makes the next one meanwhile.

    Args:
        make: called from one other thread, one call at a time; what it raises is raised here, in its turn.
        keys: of what is made.
    """
    coming: deque[tuple[K, Future[V]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        for key in keys:
            coming.append((key, thread.submit(make, key)))
            if len(coming) == 2:
                first, made = coming.popleft()
                yield first, made.result()
        for last, made in coming:
            yield last, made.result()
