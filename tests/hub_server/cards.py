"""The check of a model card's metadata."""

from __future__ import annotations

import io
import re
from typing import Any

from .messages import HttpError, Request, Response
from .routing import Site, route

RELATIONS = ("adapter", "merge", "quantized", "finetune")
MODEL_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def _metadata(text: str) -> Any:
    from ruamel.yaml import YAML

    match = re.match(r"---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n|$)", text, re.DOTALL)
    return YAML(typ="safe", pure=True).load(io.StringIO(match[1] or "")) if match else None


def problems_of(data: dict[str, Any]) -> list[str]:
    """Return what is wrong with the fields of a card that have a fixed form."""
    found = []
    for key in ("license", "library_name", "pipeline_tag", "license_name", "license_link"):
        if (
            key in data
            and not isinstance(data[key], str)
            and not (key == "license" and isinstance(data[key], list))
        ):
            found.append(f'"{key}" must be a string')
    if isinstance(data.get("license"), str) and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data["license"]):
        found.append('"license" must be one of the known identifiers')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found.append('"tags" must be an array of strings')
    base = data.get("base_model", [])
    for name in base if isinstance(base, list) else [base]:
        if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
            found.append(f'"base_model" with value "{name}" is not valid. Use a model id from the Hub.')
    if data.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        found.append(f'"base_model_relation" must be one of {list(RELATIONS)}')
    return found


@route("POST", "/api/validate-yaml")
def validate(site: Site, request: Request) -> Response:
    from ruamel.yaml import YAMLError

    try:
        data = _metadata(str(request.json().get("content", "")))
    except YAMLError as error:
        raise HttpError(400, "Invalid YAML", errors=[{"message": f"YAML: {error}"}], warnings=[]) from error
    if not data:
        warning = "empty or missing yaml metadata in repo card"
        return Response.of({"errors": [], "warnings": [{"message": warning}]})
    problems = problems_of(data) if isinstance(data, dict) else ["the metadata must be a mapping"]
    if problems:
        errors = [{"message": problem} for problem in problems]
        raise HttpError(400, "Invalid metadata", errors=errors, warnings=[])
    return Response.of({"errors": [], "warnings": []})
