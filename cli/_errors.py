"""The one table of errors: what ends a command, with which exit code, and what is said about it."""

from __future__ import annotations

import errno
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer

from ..errors import CompressError, InterruptedPush, RecipeError
from ..recipes.secrets import redact
from ..recipes.suggest import suggestion

DEFECT, USAGE, INFEASIBLE, BROKEN_OFF, NETWORK, INTERRUPTED = 1, 2, 3, 5, 7, 130

_UsageError = typer.BadParameter.__bases__[0]  # click's, or the copy that newer typer carries
_FOUND = ("checks", "metrics", "gates", "files", "differences")
_RESUMES = "the same command continues where this run stopped"


class Told(Exception):
    """A command has said how it ended; only its exit code is left.

    Args:
        exit_code: of the process.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Failure:
    """How a command ends when it does not succeed.

    Attributes:
        kind: the error's type, for programs.
        exit_code: see design: 1 defect, 2 usage, 3 infeasible, 4 source, 5 broken off, 6 refused,
            7 network, 130 interrupted.
        message: what is wrong and where.
        hint: what to do.
        place: file, line and column of a recipe error.
        pushes: what had been done on the Hub by then: `push` of the push that failed, `pushed` of a run.
        found: what a verification or a reproduction found: checks, files, differences and figures.
    """

    kind: str
    exit_code: int
    message: str
    hint: str | None = None
    place: Mapping[str, Any] = field(default_factory=dict)
    pushes: Mapping[str, Any] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        described = {
            "kind": self.kind,
            "exit_code": self.exit_code,
            "message": self.message,
            "hint": self.hint,
        }
        return {"error": {**described, **self.place, **self.pushes, **self.found}}


def classify(error: BaseException, *, started: bool, log_folder: Path | None = None) -> Failure:
    """Say how a command ends.

    Args:
        error: what was raised.
        started: a run had begun to work, so that there is something to resume.
        log_folder: where a defect's traceback goes; None or absent: the temporary folder.
    """
    for matches, describe in _TABLE:
        if matches(error):
            return _without_tokens(describe(error, started))
    log = write_log(error, log_folder)
    where = f"the traceback is in {log}" if log else "no log could be written"
    message = f"a defect of compress: {type(error).__name__}: {_one_line(error)} ({where})"
    return _without_tokens(
        Failure("Defect", DEFECT, message, "run again with --debug to see the traceback here")
    )


def _without_tokens(failure: Failure) -> Failure:
    place = {key: redact(value) if isinstance(value, str) else value for key, value in failure.place.items()}
    hint = None if failure.hint is None else redact(failure.hint)
    return replace(failure, message=redact(failure.message), hint=hint, place=place)


def traceback_of(error: BaseException) -> str:
    """Return an error's traceback as text, without tokens."""
    return redact("".join(traceback.format_exception(error)))


def write_log(error: BaseException, folder: Path | None) -> Path | None:
    """Write an error's traceback to a file and return its path; None where nothing can be written."""
    text = traceback_of(error)
    candidates = [folder] if folder is not None and folder.parent.is_dir() else []
    for candidate in (*candidates, Path(tempfile.gettempdir())):
        try:
            candidate.mkdir(exist_ok=True)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            with tempfile.NamedTemporaryFile(
                "w", prefix=f"compress-{stamp}-", suffix=".log", dir=candidate, delete=False, encoding="utf-8"
            ) as stream:
                stream.write(text)
            return Path(stream.name)
        except OSError:  # a full or read-only disk: the next candidate, then none
            continue
    return None


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else "no message"


def _ours(error: BaseException, started: bool) -> Failure:
    assert isinstance(error, CompressError)
    place: dict[str, Any] = {}
    if isinstance(error, RecipeError):
        file = None if error.file is None else str(error.file)
        place = {"file": file, "line": error.line, "column": error.column}
    kind = type(error).__name__
    result = getattr(error, "result", None) or {}
    found = {key: result[key] for key in _FOUND if key in result}
    return Failure(kind, error.exit_code, error.message, error.hint, place, _pushes(error), found)


def _pushes(error: CompressError | InterruptedPush) -> dict[str, Any]:
    found: dict[str, Any] = {} if error.push is None else {"push": dict(error.push)}
    if error.pushed:
        found["pushed"] = [{"path": path, **push} for path, push in error.pushed.items()]
    return found


def _usage(error: BaseException, started: bool) -> Failure:
    message = error.format_message().split("\n")[0].rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = getattr(context, "command", None)
    path = getattr(context, "command_path", "compress")
    hint = f"see `{path} --help`"
    # Newer typer passes its validator's jargon on.
    message = re.sub(r"Input should be a valid (\w+).*", r"not a valid \1", message)
    option = getattr(error, "option_name", None)
    found = re.match(r"No such command '(.*?)'", message)
    if found and command is not None:
        message = f"no such command {found[1]!r}"
        hint = suggestion(found[1], command.commands)
    elif option is not None and message.startswith("No such option") and command is not None:
        names = [
            name
            for parameter in command.params
            if not getattr(parameter, "hidden", False)
            for name in parameter.opts
            if name.startswith("--")
        ]
        message, hint = f"no such option {option!r}", suggestion(option, [*names, "--help"])
    return Failure("UsageError", USAGE, f"{path}: {message}", hint)


def _interrupted(error: BaseException, started: bool) -> Failure:
    if isinstance(error, InterruptedPush):
        return Failure(
            "Interrupted", INTERRUPTED, error.message, error.hint or _RESUMES, pushes=_pushes(error)
        )
    return Failure("Interrupted", INTERRUPTED, "interrupted", _RESUMES if started else None)


def _disk(error: BaseException, started: bool) -> Failure:
    name = getattr(error, "filename", None)
    message = f"{name}: the disk is full" if name else "the disk is full"
    if started:
        return Failure("DiskFull", BROKEN_OFF, message, f"free some space; {_RESUMES}")
    return Failure("DiskFull", INFEASIBLE, message, "free some space, or choose another disk by --output")


def _file_size(error: BaseException, started: bool) -> Failure:
    name = getattr(error, "filename", None) or "a file"
    message = f"{name}: would be larger than files may be here"
    hint = "raise the limit (ulimit -f), or choose another disk by --output and --work-dir"
    if started:
        return Failure("FileTooLarge", BROKEN_OFF, message, f"{hint}; {_RESUMES}")
    return Failure("FileTooLarge", INFEASIBLE, message, hint)


def _permission(error: BaseException, started: bool) -> Failure:
    name = getattr(error, "filename", None) or "a file"
    code = BROKEN_OFF if started else INFEASIBLE
    hint = "change its permissions, or choose another place by --output and --work-dir"
    return Failure(
        "PermissionDenied", code, f"{name}: not permitted", f"{hint}; {_RESUMES}" if started else hint
    )


def _memory(error: BaseException, started: bool) -> Failure:
    code = BROKEN_OFF if started else INFEASIBLE
    hint = "lower calibration.batch_size and evaluate.*.batch_size, or use a machine with more memory"
    message = f"out of memory: {_one_line(error)}"
    return Failure("OutOfMemory", code, message, f"{hint}; {_RESUMES}" if started else hint)


def _network(error: BaseException, started: bool) -> Failure:
    hint = "check the network and the token, or give a local folder by --model"
    return Failure("Network", NETWORK, f"the network or the Hub refused: {_one_line(error)}", hint)


def _has_errno(*numbers: int) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, OSError) and error.errno in numbers


def _is_out_of_memory(error: BaseException) -> bool:
    # torch raises RuntimeErrors on the CPU and OutOfMemoryError on a GPU; torch is not imported here.
    allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or allocation


def _safetensors_errno(*numbers: int) -> Callable[[BaseException], bool]:
    # safetensors wraps the operating system's error in its own type; only its text is left.
    told = [f"os error {number})" for number in numbers]
    return lambda error: (
        type(error).__module__.startswith("safetensors") and any(one in str(error).lower() for one in told)
    )


def _is_network(error: BaseException) -> bool:
    if isinstance(error, BrokenPipeError):  # a ConnectionError too, but of a pipe between processes
        return False
    home = type(error).__module__.split(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or home in (
        "huggingface_hub",
        "httpx",
        "httpx2",
        "hf_xet",
        "requests",
    )


_TABLE: tuple[tuple[Callable[[BaseException], bool], Callable[[BaseException, bool], Failure]], ...] = (
    (lambda error: isinstance(error, CompressError), _ours),
    (lambda error: isinstance(error, _UsageError), _usage),
    (lambda error: isinstance(error, KeyboardInterrupt | typer.Abort), _interrupted),
    (_has_errno(errno.ENOSPC, errno.EDQUOT), _disk),
    (_safetensors_errno(errno.ENOSPC, errno.EDQUOT), _disk),
    (_has_errno(errno.EFBIG), _file_size),
    (_safetensors_errno(errno.EFBIG), _file_size),
    (_has_errno(errno.EACCES, errno.EPERM, errno.EROFS), _permission),
    (_is_out_of_memory, _memory),
    (_is_network, _network),
)
