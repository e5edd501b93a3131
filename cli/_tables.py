"""Tables as data, drawn for a terminal, as plain lines, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..recipes.secrets import redact

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text under column names; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Table | str
"""What commands show: a table, or a line of text."""


def without_tokens(section: Section) -> Section:
    """Redact before the layout: a cell that is folded over two lines would tear a token apart."""
    if isinstance(section, str):
        return redact(section)
    rows = [[redact(cell) for cell in row] for row in section.rows]
    return Table(redact(section.title), section.columns, rows)


def to_plain(section: Section) -> str:
    """Align with spaces: for pipes and CI logs."""
    if isinstance(section, str):
        return section
    lines = [list(section.columns), *(list(row) for row in section.rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(section.columns))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    head = [section.title] if section.title else []
    return "\n".join([*head, *("  " + line.rstrip() for line in drawn)])


def to_markdown(section: Section) -> str:
    """Write as GitHub Markdown: for job summaries."""
    if isinstance(section, str):
        return section
    lines = [section.columns, ["---"] * len(section.columns), *section.rows]
    body = "\n".join("| " + " | ".join(_markdown_cell(cell) for cell in line) + " |" for line in lines)
    return f"### {section.title}\n\n{body}" if section.title else body


def _markdown_cell(text: str) -> str:
    return " ".join(text.split("\n")).replace("|", "\\|")


def to_rich(section: Section) -> RichTable | str:
    """Draw for a terminal."""
    if isinstance(section, str):
        return section
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=section.title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(section.columns):
        table.add_column(column, overflow="fold", style="cyan" if index == 0 else None)
    for row in section.rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return table


_STYLES = {"passed": "green", "ok": "green", "FAILED": "bold red", "fail": "bold red", "warn": "yellow"}
