"""What GitHub Actions shows and passes on: the job summary and the step's outputs, where asked for.

`GITHUB_STEP_SUMMARY` and `GITHUB_OUTPUT` name the files. The outputs of `compress run`:

    exit_code               of the command
    path, report            of the first result: its folder, and the report in it
    format, bytes           of the first result
    size_ratio, sqnr_db     of the first result; empty where not measured
    repo, revision, commit, url, tag
                            of the first result's push; empty where it was not pushed
    verified, gates_passed  `true` where every recipe gave a result and that holds for all
    results                 JSON: a list with all of the above for every result, and its recipe

A result is a folder that was written; of one that was refused, the folder kept aside. Those of
`compress push` are exit_code, repo, revision, commit, url and tag; of `compress run --reproduce`, reproduced.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..recipes.secrets import redact
from ._tables import Section, to_markdown

_METRICS = ("size_ratio", "sqnr_db")
_PUSH = ("repo", "revision", "commit", "url", "tag")


def write(title: str, sections: Sequence[Section], outputs: Mapping[str, Any]) -> str | None:
    """Append a part to the job summary, and outputs; see `summarise` and `write_outputs`."""
    warnings = [summarise(title, sections), write_outputs(outputs)]
    return "; ".join(filter(None, warnings)) or None


def summarise(title: str, sections: Sequence[Section]) -> str | None:
    """Append a part to the job summary; nothing where none is asked for.

    Returns:
        What could not be written, as a warning: the run itself has succeeded or failed by then.
    """
    body = "\n\n".join([f"## {title}", *(to_markdown(section) for section in sections)])
    return _append(os.environ.get("GITHUB_STEP_SUMMARY"), body + "\n\n", "the job summary is incomplete")


def write_outputs(outputs: Mapping[str, Any]) -> str | None:
    """Append outputs of the step; nothing where none are asked for.

    Returns:
        What could not be written, as a warning.
    """
    lines = "".join(f"{key}={_value(value)}\n" for key, value in outputs.items())
    return _append(os.environ.get("GITHUB_OUTPUT"), lines, "later steps get no outputs")


def outputs_of(
    results: Sequence[tuple[str, Mapping[str, Any]]], exit_code: int, *, complete: bool
) -> dict[str, Any]:
    """Return the outputs of a run's step: what later steps ask for.

    Args:
        results: recipe and report, in the single form, of every folder that was written.
        exit_code: of the whole command.
        complete: every recipe gave a result; else `verified` and `gates_passed` are false.
    """
    rows = [{"recipe": recipe, **_row(report)} for recipe, report in results]
    outputs: dict[str, Any] = {"exit_code": exit_code}
    if rows:
        outputs |= {key: value for key, value in rows[0].items() if key != "recipe"}
        outputs |= {key: complete and all(row[key] for row in rows) for key in ("verified", "gates_passed")}
    outputs["results"] = json.dumps(rows, separators=(",", ":"))
    return outputs


def push_outputs(push: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs that say where a push went; all are empty for an empty mapping."""
    return {key: push.get(key) or "" for key in _PUSH}


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    export, push = report["export"], report["export"].get("push") or {}
    measured = report["evaluation"].get("metrics", {})
    return {
        "path": str(export["path"]),
        "report": str(Path(export["path"]) / "report.json"),
        "format": export["format"],
        "bytes": export["bytes"],
        "verified": export["verified"],
        "gates_passed": all(row["passed"] for row in report["gates"]),
        **{key: measured.get(key, "") for key in _METRICS},
        **push_outputs(push),
    }


def _value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\r", " ").replace("\n", " ")  # a line is one output


def _append(path: str | None, text: str, otherwise: str) -> str | None:
    """Append to a file; what fails is returned as a warning that says what follows `otherwise`."""
    if not path:
        return None
    try:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(redact(text))
    except OSError as error:
        return f"{error.filename}: cannot be written: {error.strerror}; {otherwise}"
    return None
