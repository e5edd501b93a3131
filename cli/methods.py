"""`compress methods`: every method with its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import _options
from ._tables import Section, Table

if TYPE_CHECKING:
    from ..recipes.stages import StageSettings


def methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="Only this method.")] = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Show the methods with their settings.

    What they do, which families of models they fit, every setting with its default.

    Example:
      compress methods vidit_q
    """
    sink = _options.sink(context, as_json, quiet, debug)
    from ..recipes.schema import method_names, settings_class
    from ..recipes.suggest import suggestion

    names = method_names()
    if name is not None and name not in names:
        raise UsageError(f"no such method {name!r}", hint=suggestion(name, names))
    models = {item: settings_class(item) for item in names if name in (None, item)}
    described = [describe(model) for model in models.values() if model is not None]
    sink.result({"methods": described}, [section for item in described for section in _sections(item)])


def describe(model: type[StageSettings]) -> dict[str, Any]:
    """Describe a method by its settings model, as a JSON document."""
    from ..recipes.schema import settings_schema

    settings = list(_settings(settings_schema(model)))
    return {
        "method": model.method,
        "phase": model.phase,
        "families": sorted(model.families),
        "description": (model.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "),
        "settings": settings,
    }


def _settings(schema: dict[str, Any], above: str = "") -> Iterator[dict[str, Any]]:
    """Yield every key of a schema; those inside a mapping follow it, under dotted names."""
    for name, field in schema["properties"].items():
        yield {
            "name": above + name,
            "values": _values(field),
            "default": field.get("default"),
            "required": name in schema.get("required", []),
            "description": field.get("description", ""),
        }
        if "properties" in field:
            yield from _settings(field, f"{above}{name}.")


def _values(field: dict[str, Any]) -> str:
    """Say in a few characters what a setting may be."""
    if "anyOf" in field or "oneOf" in field:
        return " | ".join(_values(option) for option in field.get("anyOf", []) + field.get("oneOf", []))
    if "enum" in field or "const" in field:
        return " | ".join(str(value) for value in field.get("enum", [field.get("const")]))
    kind = {"array": "list", "integer": "whole number", "object": "mapping", "string": "text"}.get(
        field["type"], field["type"]
    )
    bounds = [f"{sign} {field[key]}" for key, sign in (("minimum", ">="), ("maximum", "<=")) if key in field]
    return " ".join([str(kind), *bounds])


def _sections(item: dict[str, Any]) -> list[Section]:
    rows = [
        [setting["name"], setting["values"], _default(setting), setting["description"]]
        for setting in item["settings"]
    ]
    fits = ", ".join(item["families"])
    return [
        f"{item['method']}  ({item['phase']}; fits {fits})",
        item["description"],
        Table("", ["setting", "values", "default", "meaning"], rows),
    ]


def _default(setting: dict[str, Any]) -> str:
    value = setting["default"]
    if setting["required"]:
        return "required"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict) and value:
        return "as below"
    return str(value) if value != [] else "[]"
