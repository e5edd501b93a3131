"""`compress run`: carry out a recipe."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError, VerifyError
from . import _github, _options, _render

if TYPE_CHECKING:
    from ..recipes.loader import LoadedRecipe
    from ._output import Output


def run(
    context: typer.Context,
    recipe: _options.RecipeArgument,
    overrides: _options.Set = None,
    model: _options.Model = None,
    output: _options.OutputPath = None,
    seed: _options.Seed = None,
    device: _options.Device = None,
    work_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where finished stages are kept, so that a run can resume.")
    ] = Path(".compress"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo every stage; reuse nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output folder that compress wrote.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Turn warnings into a failure.")] = False,
    push: Annotated[str | None, typer.Option("--push", hidden=True)] = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Carry out a recipe, to a smaller, verified checkpoint.

    A run that was interrupted or killed continues where it stopped.

    Examples:
      compress run dit_w4a8
      compress run my.yaml --set stages.0.vidit_q.weight_bits=8 --output out/w8
    """
    sink = _options.sink(context, as_json, quiet, debug)
    sink.log_folder = work_dir / "logs"
    if push is not None:
        raise UsageError("--push: publishing to a hub arrives in a later release", hint="run without --push")
    loaded = _options.load(recipe, overrides, model, output, seed, device)
    began = time.time()
    from .. import pipeline

    try:
        with sink.progress() as progress:
            report = pipeline.run(
                loaded,
                work_dir=work_dir,
                fresh=fresh,
                overwrite=overwrite or None,
                strict=strict,
                progress=progress,
            )
    except VerifyError:
        _show_rejected(sink, loaded, began)
        raise
    sections = _render.report(report)
    sink.result(report, sections)
    _warn(sink, _github.write(f"compress: {Path(recipe).stem}", sections, _github.outputs_of(report)))
    sink.hint(shlex.join(["compress", "inspect", report["export"]["path"]]))


def _show_rejected(sink: Output, loaded: LoadedRecipe, began: float) -> None:
    """Show the figures of a result that was refused: its report lies in the folder kept aside."""
    target = Path(loaded.recipe.export[0].path)
    path = target.with_name(target.name + ".rejected") / "report.json"
    if not path.is_file() or path.stat().st_mtime < began - 1:  # none, or an earlier run's
        return
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    sections = [*_render.metrics(report["evaluation"].get("metrics", {})), *_render.gates(report["gates"])]
    if not sink.as_json:  # stdout then carries the error alone
        sink.result(report, sections)
    outputs = {**_github.outputs_of(report), "path": path.parent, "report": path}
    _warn(sink, _github.write(f"compress: {target.name} was REJECTED", sections, outputs))


def _warn(sink: Output, message: str | None) -> None:
    if message is not None:
        sink.message(f"warning: {message}", "yellow")
