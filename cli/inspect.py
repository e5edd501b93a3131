"""`compress inspect`: what is in a checkpoint."""

from __future__ import annotations

import typer

from . import _inspection, _options


def inspect(
    context: typer.Context,
    folder: _options.FolderArgument,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Show a checkpoint's layers, bits, bytes and provenance.

    Example:
      compress inspect out/dit-w4a8
    """
    sink = _options.sink(context, as_json, quiet, debug)
    from ..exporters.inspection import inspect as inspect_folder

    document = inspect_folder(folder)
    sink.result(document, _inspection.sections(document))
