"""Memory that was freed goes back to the system, so that a stage's peak is what it really needs."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Ask the C library to give freed pages back; does nothing where it has no such call.

    glibc keeps what it frees between blocks that are still in use. A stage that replaces weights one
    after the other would then hold the old model and the new one at once.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
