"""`compress verify`: is a folder or a repository still what was published?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import VerifyError
from . import _options
from ._render import gates
from ._tables import Section, Table
from ._units import plain

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER_OR_REPO",
        help="A folder that `compress run` wrote, or a repository: org/name or org/name@revision.",
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of the repository.")]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="The original (a folder, builtin:NAME, a Hub id): measure all figures again, and compare.",
    ),
]


def verify(
    context: typer.Context,
    target: TargetArgument,
    revision: Revision = None,
    against: Against = None,
    device: _options.Device = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Check that a folder or a repository is what was published.

    Its files are held against the hashes of its report, its gates against the recorded figures, its
    manifest against the tensors. With --against BASE its outputs are measured again.

    Examples:
      compress verify out/dit-w4a8
      compress verify my-org/dit-w4a8@v1 --against builtin:dit
    """
    sink = _options.sink(context, as_json, quiet, debug)
    from .. import pipeline

    try:
        with sink.progress() as progress:
            document = pipeline.verify(
                target, revision=revision, against=against, device=device, progress=progress
            )
    except VerifyError as error:
        result = getattr(error, "result", None)
        if result is not None and not sink.as_json:  # there the error is the one document
            sink.result(result, _sections(result))
        raise
    sink.result(document, [*_sections(document), f"{document['path']}: verified"])


def _sections(document: dict[str, Any]) -> list[Section]:
    """Show the checks, and with an original the figures and gates as measured now."""
    rows = [
        [check["name"], "ok" if check["ok"] else "FAILED", check["detail"]] for check in document["checks"]
    ]
    sections: list[Section] = [Table("checks", ["check", "", "found"], rows)]
    metrics = document.get("metrics", ())
    if metrics:
        columns = ["metric", "recorded", "measured", "allowed difference", ""]
        sections.append(Table("figures", columns, [_figure(row) for row in metrics]))
    return sections + gates(document.get("gates", ()))


def _figure(row: dict[str, Any]) -> list[str]:
    values = [plain(row[key]) for key in ("recorded", "measured")]
    allowed = plain(row["tolerance"]) if row["tolerance"] else "none"
    return [row["metric"], *values, allowed, "ok" if row["agrees"] else "FAILED"]
