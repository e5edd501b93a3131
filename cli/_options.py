"""Options that several commands share, declared once."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._output import Output

if TYPE_CHECKING:
    from ..recipes.loader import LoadedRecipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", show_default=False
    ),
]
FolderArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder that `compress run` wrote.", show_default=False)
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key, such as stages.0.vidit_q.weight_bits=8; repeatable.",
    ),
]
Model = Annotated[
    str | None, typer.Option(metavar="ID", help="Another model: a Hub id, a folder, builtin:NAME.")
]
OutputPath = Annotated[str | None, typer.Option("--output", metavar="FOLDER", help="Another output folder.")]
Seed = Annotated[int | None, typer.Option(help="Another seed.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]


def sink(context: typer.Context, as_json: bool, quiet: bool, debug: bool) -> Output:
    """Return the invocation's output, set to the common options."""
    output = context.ensure_object(Output)
    if not debug:
        _hush_libraries()
    if quiet or not sys.stderr.isatty():  # bars of downloads are for people
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return output.configure(as_json=as_json, quiet=quiet, debug=debug)


def _hush_libraries() -> None:
    """Keep what model libraries log about their own optional parts out of the user's terminal."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # also for processes that we start
        os.environ.setdefault(variable, "error")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def command_line(verb: str, recipe: str, overrides: list[str] | None, **options: str | int | None) -> str:
    """Write the command that does `verb` with the same recipe and overrides."""
    words = ["compress", verb, recipe]
    for text in overrides or ():
        words += ["--set", text]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def load(
    recipe: str,
    overrides: list[str] | None,
    model: str | None,
    output: str | None,
    seed: int | None,
    device: str | None,
    push: str | None = None,
    verify_remote: bool | None = None,
) -> LoadedRecipe:
    """Load a recipe with what the command line overrides.

    Raises:
        RecipeError: with its place in the file, or the option.
    """
    from ..recipes.loader import load_recipe

    return load_recipe(
        recipe,
        overrides=overrides or (),
        model=model,
        output=output,
        seed=seed,
        device=device,
        push=push,
        verify_remote=verify_remote,
    )
