"""The command line: wires the verbs, and turns every ending into an exit code."""

from __future__ import annotations

import inspect as inspect_module
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from ._errors import DEFECT, INTERRUPTED, USAGE, Told, classify
from ._output import Output
from ._redaction import guard_streams
from .doctor import doctor
from .evaluate import evaluate
from .inspect import inspect
from .methods import methods
from .plan import plan
from .push import push
from .recipes import recipes
from .run import run
from .schema import schema
from .validate import validate
from .verify import verify

_VERBS: tuple[Callable[..., None], ...] = (
    run, plan, validate, inspect, evaluate, verify, push, recipes, methods, schema, doctor,
)  # fmt: skip


def build() -> typer.Typer:
    """Return the application."""
    app = typer.Typer(
        name="compress",
        help="Turn a pretrained checkpoint into a smaller, faster, verified one.",
        epilog="Start with: compress recipes, then compress run dit_w4a8",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_entry)
    for verb in _VERBS:
        app.command(verb.__name__, help=_help(verb))(verb)
    return app


def _help(verb: Callable[..., None]) -> str:
    """Return a verb's docstring; a mark before its examples keeps their lines as they are."""
    return re.sub(r"\n(?=Examples?:\n)", "\n\b\n", inspect_module.cleandoc(verb.__doc__ or ""))


def _entry(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from ..version import __version__

        typer.echo(f"compress {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


def invoke(arguments: Sequence[str], output: Output) -> int:
    """Run one command line and return its exit code; nothing escapes but `SystemExit`."""
    command: Any = typer.main.get_command(build())
    try:
        code = command.main(args=list(arguments), prog_name="compress", obj=output, standalone_mode=False)
        if code == INTERRUPTED:  # how typer passes on a Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except Told as ending:
        return ending.exit_code
    except (Exception, KeyboardInterrupt) as error:
        output.as_json = output.as_json or "--json" in arguments  # a refused command line set nothing
        failure = classify(error, started=output.started, log_folder=output.log_folder)
        output.failure(failure, error)
        return failure.exit_code


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """End as after Ctrl-C: a cancelled CI job too says how it goes on and leaves no process behind."""
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the console script; ends quietly where the reader of its output is gone."""
    guard_streams()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = invoke(sys.argv[1:], Output())
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end, and would complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DEFECT
    sys.exit(code)
