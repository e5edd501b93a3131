"""The one sink: results to stdout, everything else to stderr; human, `--json` or `--quiet`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..recipes.secrets import redact, redacted
from ._errors import Failure, traceback_of
from ._progress import PlainProgress, RichProgress
from ._tables import Section, to_plain, to_rich, without_tokens

if TYPE_CHECKING:
    from rich.console import Console

    from ..progress import Progress


class Output:
    """What a command prints through; lives in the typer context for one invocation.

    Attributes:
        as_json: stdout carries exactly one JSON document.
        quiet: nothing but results that were asked for as JSON, warnings and errors.
        debug: a failure shows its traceback.
        started: a run has begun to work, so that there is something to resume.
        log_folder: where tracebacks of defects go.
    """

    def __init__(self, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self.as_json = self.quiet = self.debug = self.started = False
        self.log_folder: Path | None = None

    def configure(self, *, as_json: bool = False, quiet: bool = False, debug: bool = False) -> Output:
        """Take the options that every command has."""
        self.as_json, self.quiet, self.debug = as_json, quiet, debug
        return self

    def result(self, document: Any, sections: Iterable[Section] = ()) -> None:
        """Show a command's result: the document as JSON, or the sections to people."""
        if self.as_json:
            self.document(document)
        elif not self.quiet:
            for section in sections:
                self._draw(section)

    def document(self, document: Any) -> None:
        """Print one JSON document to stdout."""
        text = json.dumps(redacted(_finite(document)), indent=1, default=str, allow_nan=False)
        self._stdout.write(redact(text) + "\n")
        self._stdout.flush()

    def message(self, text: str, style: str = "") -> None:
        """Say something on stderr, unless quiet."""
        if not self.quiet:
            self._say(text, style)

    def warning(self, text: str) -> None:
        """Say that something may be wrong."""
        self.message(f"warning: {text}", "yellow")

    def hint(self, text: str) -> None:
        """Say what to do next."""
        self.message(f"next: {text}", "dim")

    def failure(self, failure: Failure, error: BaseException | None = None) -> None:
        """Show how the command ends; under `--json` also as the one document."""
        self.tell(failure, error)
        if self.as_json:
            self.document(failure.to_json())

    def tell(self, failure: Failure, error: BaseException | None = None) -> None:
        """Say on stderr what went wrong and what to do."""
        if self.debug and error is not None:
            self._stderr.write(traceback_of(error))
        self._say(f"error: {failure.message}", "bold red")
        if failure.hint and not (self.debug and failure.kind == "Defect"):  # that hint says: --debug
            self._say(f"  hint: {failure.hint}", "")

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Give library code a place to report to, drawn for the mode and the terminal."""
        if self.quiet or not _is_terminal(self._stderr):
            yield PlainProgress(lambda line: self._say(line, ""), quiet=self.quiet, on_start=self._start)
            return
        bars = RichProgress(self._console(self._stderr), on_start=self._start)
        try:
            yield bars
        finally:
            bars.close()

    def _start(self) -> None:
        self.started = True

    def _draw(self, section: Section) -> None:
        section = without_tokens(section)
        if _is_terminal(self._stdout):
            self._console(self._stdout).print(to_rich(section), markup=False, highlight=False)
        else:
            self._stdout.write(to_plain(section) + "\n")
            self._stdout.flush()

    def _say(self, text: str, style: str) -> None:
        text = redact(text)
        if _is_terminal(self._stderr):
            console = self._console(self._stderr)
            console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stderr.write(text + "\n")
            self._stderr.flush()

    @staticmethod
    def _console(stream: TextIO) -> Console:
        from rich.console import Console

        return Console(file=stream)


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON cannot hold, by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_terminal(stream: TextIO) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())
