"""What GitHub Actions shows and passes on: the job summary and the step's outputs, where asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ._tables import Section, to_markdown


def write(title: str, sections: Sequence[Section], outputs: Mapping[str, Any]) -> str | None:
    """Append to the files that `GITHUB_STEP_SUMMARY` and `GITHUB_OUTPUT` name; nothing where unset.

    Returns:
        What could not be written, as a warning: the run itself has succeeded or failed by then.
    """
    try:
        _write(title, sections, outputs)
    except OSError as error:
        return f"{error.filename}: cannot be written: {error.strerror}; the job summary is incomplete"
    return None


def _write(title: str, sections: Sequence[Section], outputs: Mapping[str, Any]) -> None:
    summary, target = os.environ.get("GITHUB_STEP_SUMMARY"), os.environ.get("GITHUB_OUTPUT")
    if summary:
        body = "\n\n".join([f"## {title}", *(to_markdown(section) for section in sections)])
        _append(Path(summary), body + "\n\n")
    if target:
        lines = "".join(f"{key}={_value(value)}\n" for key, value in outputs.items())
        _append(Path(target), lines)


def outputs_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outputs of a run's step: what later steps ask for."""
    export = report["export"]
    return {
        "path": export["path"],
        "report": Path(export["path"]) / "report.json",
        "format": export["format"],
        "bytes": export["bytes"],
        "verified": export["verified"],
        "gates_passed": all(row["passed"] for row in report["gates"]),
        **{key: report["evaluation"].get("metrics", {}).get(key, "") for key in ("size_ratio", "sqnr_db")},
    }


def _value(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace("\r", " ").replace("\n", " ")  # a line is one output


def _append(path: Path, text: str) -> None:
    """Append, or raise an OSError; the caller's result stands either way."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)
