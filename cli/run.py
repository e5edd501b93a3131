"""`compress run`: carry out recipes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, VerifyError
from ..recipes.workers import read_workers
from . import _github, _options, _render, _runs
from ._errors import Told
from ._output import Output

_Recipes = Annotated[
    list[str] | None,
    typer.Argument(metavar="RECIPE", help="Recipe files, or names of shipped recipes.", show_default=False),
]
_WorkDirectory = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Where finished stages are kept, so that a run can resume.")
]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Redo every stage; reuse nothing.")]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output folder that compress wrote.")
]
_Strict = Annotated[bool, typer.Option("--strict", help="Turn warnings into a failure.")]
_Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ray[:N]",
        help="Processes that a stage may use, where it can; or actors of a Ray cluster, N at most: that of"
        " RAY_ADDRESS, else one of this machine. The result stays the same.",
    ),
]
_Push = Annotated[
    str | None,
    typer.Option(
        "--push", metavar="ORG/NAME[@BRANCH]", help="Push the verified result to this repository of the Hub."
    ),
]
_NoVerifyRemote = Annotated[
    bool, typer.Option("--no-verify-remote", help="Do not download and verify again what was pushed.")
]
_Reproduce = Annotated[
    str | None,
    typer.Option(
        "--reproduce",
        metavar="FOLDER_OR_REPO",
        help="Run the recipe of this result again and compare the hashes of its files; no recipe is given.",
    ),
]


def run(
    context: typer.Context,
    recipe: _Recipes = None,
    overrides: _options.Set = None,
    model: _options.Model = None,
    output: _options.OutputPath = None,
    push: _Push = None,
    seed: _options.Seed = None,
    device: _options.Device = None,
    work_dir: _WorkDirectory = Path(".compress"),
    fresh: _Fresh = False,
    overwrite: _Overwrite = False,
    strict: _Strict = False,
    no_verify_remote: _NoVerifyRemote = False,
    workers: _Workers = "1",
    reproduce: _Reproduce = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Carry out recipes, each to a smaller, verified checkpoint.

    A run that was interrupted or killed continues where it stopped. Several recipes are all read first,
    then carried out in order; one that fails does not stop the next, and the worst exit code is the
    command's.

    Examples:
      compress run dit_w4a8
      compress run my.yaml --set stages.0.vidit_q.weight_bits=8 --output out/w8
      compress run my.yaml --push my-org/dit-w4a8
      compress run dit_w4a8 dit_w8a8 --strict
      compress run --reproduce out/dit-w4a8
    """
    sink = _options.sink(context, as_json, quiet, debug)
    sink.log_folder = work_dir / "logs"
    recipes = list(recipe or ())
    changed: dict[str, Any] = {
        "--set": overrides, "--model": model, "--output": output, "--push": push, "--seed": seed,
        "--device": device, "--fresh": fresh, "--overwrite": overwrite, "--strict": strict,
        "--no-verify-remote": no_verify_remote,
    }  # fmt: skip
    if reproduce is not None:
        _refuse_with_reproduce(recipes, changed)
        _again(sink, reproduce, work_dir)
        return
    _refuse_for_many(recipes, changed)
    load = partial(
        _options.load, overrides=overrides, model=model, output=output, seed=seed, device=device, push=push,
        verify_remote=False if no_verify_remote else None,
    )  # fmt: skip
    how = _runs.How(work_dir, fresh, overwrite or None, strict, read_workers(workers))
    code = _runs.carry_out(sink, recipes, load, how)
    if code:
        raise Told(code)


def _refuse_for_many(recipes: list[str], changed: dict[str, Any]) -> None:
    """Refuse no recipe at all, and options that mean one result where there are several."""
    if not recipes:
        raise UsageError("compress run: Missing argument 'RECIPE'", hint="see `compress run --help`")
    for option, key in (("--output", "path"), ("--push", "push")):
        if len(recipes) > 1 and changed[option] is not None:
            raise UsageError(
                f"{option}: {len(recipes)} recipes are given, and all their results would go to one place",
                hint=f"write export.{key} in each recipe, or run them one by one",
            )


def _refuse_with_reproduce(recipes: list[str], changed: dict[str, Any]) -> None:
    """Refuse what would make the run another one than the folder's."""
    given = [*recipes, *(option for option, value in changed.items() if value not in (None, False, []))]
    if given:
        raise UsageError(
            f"--reproduce: does not go together with {', '.join(given)}",
            hint="the recipe, its settings and its seed are those of the folder",
        )


def _again(sink: Output, target: str, work_dir: Path) -> None:
    """Run the recipe of a result again; a difference is shown, then raised as a VerifyError."""
    from .. import pipeline

    try:
        with sink.progress() as progress:
            document = pipeline.reproduce(target, work_dir=work_dir, progress=progress)
    except VerifyError as error:
        result = getattr(error, "result", None)
        if result is not None:
            if not sink.as_json:  # there the error is the one document
                sink.result(result, _render.reproduction(result))
            _pass_on(sink, target, result)
        raise
    sink.result(document, [*_render.reproduction(document), f"{document['folder']}: reproduced"])
    _pass_on(sink, target, document)


def _pass_on(sink: Output, target: str, document: dict[str, Any]) -> None:
    equal = document["reproduced"]
    title = f"compress: {target} {'was reproduced' if equal else 'was NOT reproduced'}"
    warning = _github.write(title, _render.reproduction(document), {"reproduced": equal})
    if warning is not None:
        sink.warning(warning)
