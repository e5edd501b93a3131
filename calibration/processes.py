"""Processes that open something once and then do job after job; the parent hands out and collects.

The protocol of the pipe: jobs go down; `ready`, `at`, `result`, `done` and `error` come up.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Generic, Literal, Protocol, TypeVar

from ..errors import CompressError, StageError

J = TypeVar("J")
R = TypeVar("R")
J_contra = TypeVar("J_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

Announce = Callable[[str], None]
"""Tells the parent what the process is at, for the message should it die there."""
Kind = Literal["ready", "at", "result", "done"]
_GRACE_SECONDS = 5.0


class Work(Protocol[J_contra, R_co]):
    """What a process does; picklable.

    Attributes:
        does: completes "a process that ...", for messages.
        hint: what to do where one dies.
    """

    @property
    def does(self) -> str: ...  # noqa: D102 - see above

    @property
    def hint(self) -> str: ...  # noqa: D102 - see above

    def opened(self, announce: Announce) -> AbstractContextManager[Callable[[J_contra], Iterable[R_co]]]:
        """Open, in the process, what all jobs need; a job gives results one by one."""


class Worker(Generic[J, R]):
    """A process and what the parent knows about it. It starts at once, and has to be ended.

    Args:
        work: what it does.
        at: where it is until it or the parent says more.

    Attributes:
        at: where it is, for the message should it die.
        pipe: to wait for; readable when `receive` does not wait.
    """

    def __init__(self, work: Work[J, R], at: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.at, self._work = at, work
        self._process = context.Process(target=_run, args=(other, work), daemon=True)
        # What it starts first lets Ctrl-C through again, and would do so behind the mask below.
        resource_tracker.ensure_running()
        # Ctrl-C reaches every process of the terminal. The mask is inherited: only the parent hears it,
        # also while the others are still starting, and ends them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        other.close()  # the process holds the only one, so that its death can be heard

    def give(self, job: J) -> None:
        """Hand over a job; it is begun when those before it are done."""
        try:
            self.pipe.send(job)
        except (BrokenPipeError, ConnectionResetError):
            return  # the process is gone; why is what `receive` says next

    def receive(self) -> tuple[Kind, Any]:
        """Wait for one message and return it: its kind, and the result where it is one.

        Raises:
            StageError: the process died; the message says where.
            CompressError: what the work raised.
            RuntimeError: a defect, with the traceback of the process.
        """
        try:
            kind, content = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if kind == "error":
            raise content
        if kind == "at":
            self.at = f"at {content}"
        return kind, content

    def _died(self) -> StageError:
        self._process.join(_GRACE_SECONDS)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        return StageError(f"a process that {self._work.does} {how}, {self.at}", hint=self._work.hint)

    def end(self) -> None:
        """End the process, whatever it is doing; who waits in `receive` hears that it died."""
        self._process.terminate()
        self._process.join(_GRACE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def close(self) -> None:
        """Close the pipe of an ended process, when nobody waits for it any more."""
        self.pipe.close()


def _run(pipe: Connection, work: Work[Any, Any]) -> None:
    """Do job after job until the parent closes the pipe."""
    try:
        with work.opened(lambda place: pipe.send(("at", place))) as do:
            pipe.send(("ready", None))
            while True:
                for result in do(pipe.recv()):
                    pipe.send(("result", result))
                pipe.send(("done", None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone
    except Exception as error:
        _send_last(pipe, sent_error(error, f"a process that {work.does}"))


def sent_error(error: Exception, who: str) -> Exception:
    """Return what another process is to raise for an error that was just caught here.

    Args:
        error: of ours, which is returned as it is; or a defect, of which the traceback becomes the message.
        who: failed, for the message.
    """
    if isinstance(error, CompressError):
        return error
    return RuntimeError(f"{who} failed:\n{traceback.format_exc()}")


def _send_last(pipe: Connection, error: Exception) -> None:
    try:
        pipe.send(("error", error))
    except (BrokenPipeError, ConnectionResetError):
        return  # nobody is left to tell
