"""pydantic's findings as sentences with a place: what is wrong, where, what to write instead."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..errors import RecipeError
from .allocation import NAME
from .depth import GROUP
from .schema import DEVICE, Recipe, Stage, settings_class
from .suggest import suggestion
from .tree import Location, Tree, dotted

_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "int": "a whole number",
        "float": "a number",
        "string": "text",
        "bool": "true or false",
        "tuple": "a list",
        "list": "a list",
        "dict": "a mapping",
        "model": "a mapping",
        "model_attributes": "a mapping",
        "path": "a path",
    }
)
_BOUNDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
)
_OF_ITS_KIND = frozenset({"string_pattern_mismatch", "too_short", "too_long", "too_few"})
_PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        DEVICE: "auto, cpu, cuda or cuda:N",
        GROUP: 'two counts as in "1:2": of two blocks in a row one stays',
        NAME: "letters, digits, - and _",
    }
)
"""Pattern of a key -> what it takes; of methods of other packages the pattern itself is told."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its location in the recipe, a sentence, what to do."""

    location: Location
    message: str
    hint: str | None
    at_key: bool


def to_error(error: ValidationError, tree: Tree) -> RecipeError:
    """Return all findings as one error: the first one with its place, the others as lines of their own.

    A single finding's hint is the error's; several have theirs behind each sentence.
    """
    findings = _findings(error, tree.value)
    placed = [(tree.place(item.location, of_key=item.at_key), item) for item in findings]
    placed.sort(key=lambda pair: (pair[0].line or 0, pair[0].column or 0))
    place, first = placed[0]
    if len(placed) == 1:
        return place.error(_sentence(first), first.hint)
    lines = [
        f"{at}{': ' if str(at) else ''}{_sentence(item)}{f' ({item.hint})' if item.hint else ''}"
        for at, item in placed
    ]
    lines[0] = lines[0].removeprefix(f"{place}: ")  # the error writes its own place
    return place.error("\n".join(lines))


def _sentence(item: Finding) -> str:
    return f"{dotted(item.location)}: {item.message}" if item.location else item.message


def _findings(error: ValidationError, value: Any) -> list[Finding]:
    groups: dict[Location, list[dict[str, Any]]] = {}
    for row in error.errors(include_url=False, include_input=True):
        item: dict[str, Any] = _about_the_list({**row, "loc": _as_written(row["loc"], value)})
        location = _existing(item["loc"], value, item["type"] == "missing")
        groups.setdefault(location, []).append(item)
    found = []
    for location, rows in groups.items():
        below = any(other[: len(location)] == location and other != location for other in groups)
        if below and all(row["type"] == "too_short" or _is_kind(row) for row in rows):
            # pydantic counts only the valid entries, and asks for the other kinds that a key may have:
            # the entries' own findings say it.
            continue
        found.append(_explain(location, rows, value))
    return found


def _about_the_list(row: dict[str, Any]) -> dict[str, Any]:
    """Tell of entries that a list of fixed length lacks at the list: its places are no keys."""
    *above, last = row["loc"]
    if row["type"] != "missing" or not isinstance(last, int):
        return row
    return {**row, "loc": tuple(above), "type": "too_few", "ctx": {"length": last + 1}}


def _is_kind(row: Mapping[str, Any]) -> bool:
    """Tell whether pydantic asks for another kind of value: text, a list, ..."""
    return bool(row["type"].endswith("_type"))


def _as_written(location: Location, value: Any) -> Location:
    """Drop the position in `export` where the recipe has no list there: one mapping is read as a list."""
    if location[:2] == ("export", 0) and isinstance(value.get("export"), dict):
        return location[:1] + location[2:]
    return location


def _existing(location: Location, value: Any, missing: bool) -> Location:
    """Leave out the parts of a location that name no key: pydantic's labels of a union's members.

    Args:
        location: pydantic's.
        value: the recipe.
        missing: the last part is a key that is not there, but should be.
    """
    found: list[str | int] = []
    for depth, part in enumerate(location):
        inside = isinstance(value, dict) and part in value
        listed = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if inside or listed:
            value = value[part]
        elif not missing or depth < len(location) - 1:
            continue
        found.append(part)
    return tuple(found)


def _at(value: Any, location: Location) -> Any:
    for part in location:
        value = value[part]
    return value


def _explain(location: Location, rows: Sequence[dict[str, Any]], value: Any) -> Finding:
    first = rows[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "recipe":
        return Finding(location, context["message"], context.get("hint"), at_key=True)
    if kind == "value_error":
        return Finding(location, str(context["error"]), None, at_key=False)
    if kind == "extra_forbidden":
        keys = allowed_keys(location[:-1])
        meant = str(location[-1])
        # Ranks follow from the share that goes.
        named = "removed" if meant in ("rank", "ranks") and "removed" in keys and "window" in keys else meant
        hint: str | None = suggestion(named, keys)
        return Finding(location, f"unknown key {location[-1]!r}", hint, at_key=True)
    if kind == "missing":
        return Finding(location, "this key is required", _missing_hint(location), at_key=True)
    at_key = first["loc"][-1:] == ("[key]",)
    shown = _shown(location[-1] if at_key else _at(value, location))
    # Where a value is of a kind that may stand there, only what else is wrong with it is told.
    fitting = [row for row in rows if row["type"] in _OF_ITS_KIND][-1:] or rows
    wanted = [_wanted(row) for row in fitting]
    hint = "remove the key to keep its default" if shown == "null" else None
    if len(wanted) == 1 and wanted[0].startswith("one of"):
        return Finding(location, f"{shown} is not {wanted[0]}", hint, at_key=False)
    return Finding(location, f"{shown} is not {' or '.join(wanted)}", hint, at_key=at_key)


def _missing_hint(location: Location) -> str:
    examples: dict[Location, str] = {
        ("model",): "model: builtin:dit",
        ("export",): "export: {path: out/result}",
        ("stages",): "stages: [{rtn: {}}]",
        ("export", "path"): "path: out/result",
        ("export", "push", "repo"): "repo: org/name",
        ("stages", "mixdq", "budget"): "budget: {mean_bits: 4}",
        ("stages", "vidit_q", "bits", "budget"): "budget: {mean_bits: 4}",
    }
    keys = tuple(part for part in location if isinstance(part, str))
    return f"add `{examples.get(keys, f'{location[-1]}: ...')}`"


def _wanted(row: Mapping[str, Any]) -> str:
    """Say what would have been right."""
    kind, context = row["type"], row.get("ctx", {})
    if kind == "literal_error":
        expected = context["expected"].replace(" or ", ", ")
        return f"one of {expected}" if "," in expected else expected
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {context[key]}"
    special: Mapping[str, Callable[[], str]] = {
        "string_pattern_mismatch": lambda: _PATTERNS.get(
            context["pattern"], f"text that matches {context['pattern']}"
        ),
        "too_few": lambda: f"a list of {context['length']} entries",
        "string_too_short": lambda: "text with at least one character",
        "too_short": lambda: f"a list of at least {_entries(context['min_length'])}",
        "too_long": lambda: f"a list of at most {_entries(context['max_length'])}",
        "finite_number": lambda: "a finite number",
    }
    if kind in special:
        return special[kind]()
    noun = _KINDS.get(kind.rsplit("_", 1)[0])
    return noun if noun else row["msg"].removeprefix("Input should be ")


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _shown(value: Any) -> str:
    """Write a value as in a recipe, shortened."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed_keys(location: Location) -> list[str]:
    """Return the keys that may stand in the mapping at `location`."""
    model: Any = Recipe
    if len(location) >= 3 and location[0] == "stages":
        model, location = settings_class(str(location[2])), location[3:]
    for part in (part for part in location if isinstance(part, str)):
        if get_origin(model) is dict:
            model = _model_in(get_args(model)[1])
        elif _is_model(model) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
        else:
            return []
    return list(model.model_fields) if _is_model(model) else []


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _model_in(annotation: Any) -> Any:
    """Return what `X`, `X | None`, `tuple[X, ...]` or an annotated X is about: a model, or a dict."""
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return _model_in(next((item for item in get_args(annotation) if item is not type(None)), None))
    return None if annotation is Stage else annotation
