"""`compress verify`: is a folder still what was published?"""

from __future__ import annotations

import typer

from . import _options, _render


def verify(
    context: typer.Context,
    folder: _options.FolderArgument,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Check that a folder is what was published.

    Its files are held against the hashes of its report, its manifest against the tensors.

    Example:
      compress verify out/dit-w4a8
    """
    sink = _options.sink(context, as_json, quiet, debug)
    from ..exporters.verify import verify_folder

    document = verify_folder(folder)
    sink.result(document, [*_render.anything(document), f"{folder}: verified"])
