"""Programs that are started with a session of their own, of which no process may be left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def begin(command: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    """Start a program as the leader of a session, whose outputs are read."""
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, **environment},
        # What starts the tests may ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def members(session: int) -> list[int]:
    """Return the processes of a session; some put those that they start into groups of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def gone(session: int, seconds: float = 20.0) -> bool:
    """Wait until a session has no process."""
    end = time.monotonic() + seconds
    while members(session) and time.monotonic() < end:
        time.sleep(0.05)
    return not members(session)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a program that still runs; nothing of its session may be left."""
    if process.poll() is None:
        process.kill()
        process.wait()
    assert gone(process.pid), "a process is left"
