"""`compress recipes`: what is shipped."""

from __future__ import annotations

import typer

from . import _options
from ._tables import Table


def recipes(
    context: typer.Context,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """List the shipped recipes.

    `run`, `plan` and `validate` take them by name.
    """
    sink = _options.sink(context, as_json, quiet, debug)
    from ..recipes.shipped import shipped

    found = shipped()
    document = {
        "recipes": [
            {"name": item.name, "file": str(item.file), "does": item.does, "needs": item.needs}
            for item in found
        ]
    }
    rows = [[item.name, item.does, item.needs] for item in found]
    sink.result(document, [Table("", ["recipe", "what it does", "what it needs"], rows)])
    sink.hint(f"compress run {found[0].name}")
