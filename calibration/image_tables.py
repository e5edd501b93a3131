"""The table of a folder of images: metadata.csv or metadata.jsonl with `file_name` and `label`. Torch-free.

Anyone may have written it: what is not understood is refused with its line.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import SourceError

METADATA = ("metadata.csv", "metadata.jsonl")
_FILE_NAME, _LABEL = "file_name", "label"
_MAX_BYTES = 2**30
_COLUMNS_HINT = f"its columns are {_FILE_NAME} and {_LABEL}, or {_FILE_NAME} alone for images without labels"
_SHOWN = 5


@dataclass(frozen=True)
class _Row:
    """A row, and the line that it begins in."""

    line: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """What a table says.

    Attributes:
        paths: of the images that it names.
        labels: what each of them is called; None: it has no labels.
        lack: which other columns it has where it has no labels, as a sentence; empty: it has none.
    """

    paths: tuple[Path, ...]
    labels: tuple[str, ...] | None
    lack: str


def read_table(root: Path, table: Path) -> Table:
    """Return the images that a table names, and what each is called.

    Args:
        root: folder of the images.
        table: one of `METADATA` in it.

    Raises:
        SourceError: with the line, where one is at fault.
    """
    try:
        if not table.is_file():
            raise SourceError(f"{table}: is no regular file")
        if table.stat().st_size > _MAX_BYTES:
            raise SourceError(f"{table}: larger than {_MAX_BYTES:,} bytes")
        rows = list(_csv_rows(table) if table.suffix == ".csv" else _json_rows(table))
    except OSError as error:
        raise SourceError(f"{table}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise SourceError(f"{table}: has no rows", hint=_COLUMNS_HINT)
    paths = tuple(_inside(root, table, row) for row in rows)
    _refuse_repeated(root, table, rows, paths)
    labels = _labels(table, rows)
    return Table(paths, labels, _lack(table, rows) if labels is None else "")


def _csv_rows(table: Path) -> Iterator[_Row]:
    lines = csv.reader(_lines(table), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in lines:
            start, line = line, lines.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(table, start, cells)
                continue
            if len(cells) != len(header):
                count = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
                raise SourceError(
                    f"{table}: line {start} has {count} for {len(header)} columns ({_shown(header)})",
                    hint='give it one for each column; quote a name with a comma: "tench, Tinca tinca"',
                )
            yield _Row(start, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise SourceError(f"{table}: line {lines.line_num}: {error}") from None


def _header(table: Path, line: int, cells: list[str]) -> list[str]:
    found = f"{table}: line {line} names the columns {_shown(cells)}"
    if len(cells) == 1 and any(mark in cells[0] for mark in ";\t|"):
        raise SourceError(found, hint="separate columns with commas")
    if len(set(cells)) < len(cells):
        raise SourceError(f"{found}, one of them twice", hint=_COLUMNS_HINT)
    if _FILE_NAME not in cells:
        raise SourceError(f"{found}, and no {_FILE_NAME!r}", hint=_COLUMNS_HINT)
    return cells


def _json_rows(table: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # A number of thousands of digits is a ValueError, deep nesting a RecursionError.
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
            raise SourceError(f"{table}: line {number} cannot be read: {reason}") from None
        if not isinstance(row, dict):
            raise SourceError(f"{table}: line {number} is no JSON object")
        yield _Row(number, row)


def _lines(table: Path) -> Iterator[str]:
    """Yield lines with their ends; line by line, so that a byte at fault has its number."""
    with table.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SourceError(
                    f"{table}: line {number} is no UTF-8 text ({error.reason})",
                    hint="save the table as UTF-8",
                ) from None
            if "\0" in text:
                raise SourceError(f"{table}: line {number} has a NUL byte in it")
            yield text


def _inside(root: Path, table: Path, row: _Row) -> Path:
    """Return the place of a row's file; it may not lead out of the folder."""
    name = row.values.get(_FILE_NAME)
    if not isinstance(name, str) or not name:
        raise SourceError(
            f"{table}: line {row.line} has no {_FILE_NAME} ({_shown(list(row.values))})", hint=_COLUMNS_HINT
        )
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise SourceError(f"{table}: line {row.line}: {name!r} is no name of a file") from None
    given = PurePosixPath(name)
    if "\0" in name or not given.name:
        raise SourceError(f"{table}: line {row.line}: {name!r} is no name of a file")
    if given.is_absolute() or ".." in given.parts or "\\" in name:
        raise SourceError(f"{table}: line {row.line}: {name!r} leads out of the folder")
    return root / given


def _refuse_repeated(root: Path, table: Path, rows: Sequence[_Row], paths: Sequence[Path]) -> None:
    """Refuse a file that is named twice, also by way of a link in the folder."""
    base = os.path.realpath(root) + os.sep
    by_place: dict[Path, int] = {}
    by_file: dict[tuple[int, int], int] = {}
    for index, path in enumerate(paths):
        first = by_place.setdefault(path, index)
        if first == index:
            try:
                stat = path.stat()
            except OSError:
                continue  # missing or broken: counted when it is to be decoded
            first = by_file.setdefault((stat.st_dev, stat.st_ino), index)
        if first == index:
            continue
        real = os.path.realpath(path)
        # Files that are links into a store of contents are files of their own, even where they are equal.
        if path == paths[first] or (real == os.path.realpath(paths[first]) and real.startswith(base)):
            raise SourceError(
                f"{table}: line {rows[index].line} names {rows[index].values[_FILE_NAME]!r}, which line"
                f" {rows[first].line} has as {rows[first].values[_FILE_NAME]!r}",
                hint="name every image once",
            )


def _labels(table: Path, rows: Sequence[_Row]) -> tuple[str, ...] | None:
    if all(row.values.get(_LABEL) is None for row in rows):
        return None
    for row in rows:
        label = row.values.get(_LABEL)
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise SourceError(
                f"{table}: line {row.line} has no label", hint="give all images a label, or none of them"
            )
    return tuple(str(row.values[_LABEL]) for row in rows)


def _lack(table: Path, rows: Sequence[_Row]) -> str:
    """Name the columns where labels may be under another name; empty: there are no other columns."""
    found = {str(key) for row in rows for key in row.values}
    others = sorted(found - {_FILE_NAME, _LABEL})
    if not others or _LABEL in found:
        return ""
    what = "its header names the columns" if table.suffix == ".csv" else "its lines have the keys"
    return f"{table.name}: {what} {_shown([_FILE_NAME, *others])}, and no {_LABEL!r}"


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)[:40]) for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")
