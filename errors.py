"""What can go wrong, as types: each carries the exit code that `cli` ends with.

A message says what is wrong and where; `hint` says what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CompressError(Exception):
    """Base of every error that is meant for the user; a defect of ours is any other exception.

    Attributes:
        message: what is wrong, and where.
        hint: what to do about it.
        push: what a push had done on the Hub when it failed, as `PushResult.to_json`; None: nothing.
        pushed: of a run whose pushes had begun: path of a folder -> what was done on the Hub with it.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str | None = None, push: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.push = push
        self.pushed: Mapping[str, Mapping[str, Any]] | None = None


class UsageError(CompressError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class RecipeError(CompressError):
    """The recipe is wrong at a known place.

    Args:
        message: what is wrong, starting with the dotted path of the key where there is one.
        file: the recipe, or None for a recipe given as a Python value.
        line: 1-based, or None where no place is known.
        column: 1-based.
        hint: the nearest allowed name, or what to write instead.
    """

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        column: int | None = None,
        hint: str | None = None,
    ) -> None:
        place = ":".join(str(part) for part in (file, line, column) if part is not None)
        super().__init__(f"{place}: {message}" if place else message, hint=hint)
        self.file, self.line, self.column = file, line, column


class PlanError(CompressError):
    """The plan cannot be carried out: budget, memory, disk, or a stage that does not fit."""

    exit_code = 3


class SourceError(CompressError):
    """The source checkpoint or the calibration data is missing, damaged or unsafe."""

    exit_code = 4


class StageError(CompressError):
    """A stage failed in the middle; what was finished before it is kept and reused."""

    exit_code = 5


class VerifyError(CompressError):
    """A gate of `require` or the verification of the exported folder failed."""

    exit_code = 6


class HubError(CompressError):
    """The network or the Hub refused."""

    exit_code = 7


class TagTakenError(HubError):
    """The tag of a push is on another commit."""


class InterruptedPush(KeyboardInterrupt):
    """Ctrl-C, or a termination, while something was pushed.

    Args:
        message: how far it was.
        hint: how to go on.

    Attributes:
        push, pushed: as of `CompressError`.
    """

    def __init__(
        self, message: str, *, hint: str | None = None, push: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.hint, self.push = message, hint, push
        self.pushed: Mapping[str, Mapping[str, Any]] | None = None
