"""What the server is told to do wrong, and the record of what it was asked."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from .messages import HttpError

TEXTS = {
    429: "We had to rate limit you. Please retry later.",
    500: "Internal Error - We're working hard to fix this as soon as possible!",
    503: "Service Unavailable",
}


@dataclass
class Fault:
    """One thing to do wrong, `times` times, for requests that fit.

    Attributes:
        status: answer this, after the body was received, and do nothing else.
        cut_after: cut the connection once so many bytes of the body arrived; of a GET: were sent.
        delay: seconds to wait first.
        hook: "commit" - somebody commits to the branch of the request, then it goes on as usual;
            "lose answer" - do what is asked, then cut the connection instead of answering.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    delay: float | None = None
    hook: str | None = None

    def __post_init__(self) -> None:
        if self.hook not in (None, "commit", "lose answer"):
            raise ValueError(f"unknown hook {self.hook!r}")

    def fits(self, method: str, path: str) -> bool:
        return self.times > 0 and method == self.method and bool(re.search(self.path, path))

    def error(self) -> HttpError:
        assert self.status
        return HttpError(self.status, TEXTS.get(self.status, "told to fail"), headers=self.headers)


@dataclass
class Record:
    """One request; it is listed as soon as it begins, with status None until it is answered."""

    method: str
    path: str
    host: str
    query: dict[str, list[str]]
    token_name: str | None = None
    status: int | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def received(self, count: int) -> None:
        self.received_bytes += count

    def end(self, status: int | None) -> None:
        self.status, self.seconds = status, time.monotonic() - self.started


class Faults:
    """The faults still to come, and the record of requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._records: list[Record] = []

    def clear(self) -> None:
        with self._lock:
            self._faults, self._records = [], []

    def forget(self) -> None:
        """Drop the faults still to come."""
        with self._lock:
            self._faults = []

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the first fault that fits, and count it."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.fits(method, path)), None)
            if fault:
                fault.times -= 1
            return fault

    def note(self, record: Record) -> Record:
        with self._lock:
            self._records.append(record)
        return record

    def left(self) -> list[dict[str, Any]]:
        """Return the faults that were not met as often as told."""
        with self._lock:
            return [asdict(fault) for fault in self._faults if fault.times > 0]

    def records(self) -> list[dict[str, Any]]:
        with self._lock:
            return [asdict(record) for record in self._records]
