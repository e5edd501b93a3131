"""`compress evaluate`: measure an exported folder against its original."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import VerifyError
from . import _options, _render


def evaluate(
    context: typer.Context,
    folder: _options.FolderArgument,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Whose model, evaluate and require are used; default: the folder's own."
        ),
    ] = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Measure an exported folder against its original.

    Examples:
      compress evaluate out/dit-w4a8
      compress evaluate out/dit-w4a8 --recipe stricter.yaml --json
    """
    sink = _options.sink(context, as_json, quiet, debug)
    loaded = None if recipe is None else _options.load(recipe, None, None, None, None, None)
    from .. import pipeline

    with sink.progress() as progress:
        document = pipeline.evaluate(str(folder), recipe=loaded, progress=progress)
    sections = [
        *_render.metrics(document["evaluation"].get("metrics", {})),
        *_render.gates(document["gates"]),
    ]
    failed = [row["metric"] for row in document["gates"] if not row["passed"]]
    if failed and sink.as_json:  # the error is then the one document
        raise _refused(failed)
    sink.result(document, sections)
    if failed:
        raise _refused(failed)


def _refused(failed: list[str]) -> VerifyError:
    return VerifyError(f"gates not passed: {', '.join(failed)}", hint="see the recipe's `require`")
