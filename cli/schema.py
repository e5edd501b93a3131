"""`compress schema`: the recipe as JSON Schema."""

from __future__ import annotations

import typer

from . import _options


def schema(
    context: typer.Context,
    as_json: _options.AsJson = False,
    debug: _options.Debug = False,
) -> None:
    """Print the JSON Schema of recipes, for editors and tools.

    Example:
      compress schema > recipe.schema.json
    """
    sink = _options.sink(context, as_json, False, debug)
    from ..recipes.schema import json_schema

    sink.document(json_schema())
