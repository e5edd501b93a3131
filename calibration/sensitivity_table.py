"""The table of sensitivities on disk: a header and one JSON line per measured row.

A row is written when it is measured, so a killed run loses what it was working on and nothing else. The
header holds a hash of everything that the rows depend on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..errors import SourceError

FORMAT = "compress sensitivity"
VERSION = 1
"""Raise it when the same key would stand for other rows."""

_BEGINNING = json.dumps({"format": FORMAT}).encode()[:-1]

_MEASURE = "leave out sensitivity.table to measure, or name another file"

Kind = Literal["weight", "activation"]
Metric = Literal["sqnr_db", "ssim"]
Place = tuple[str, str, str]


@dataclass(frozen=True)
class Row:
    """How much the model's output suffers from one layer.

    Attributes:
        kind: what of the layer was quantized.
        layer: dotted name.
        label: of the candidate, unique among those of the layer's kind.
        bits: of the candidate.
        metric: what `value` is.
        value: dB for `sqnr_db`, -1..1 for `ssim`; higher is better.
        loss: error power / power of the output over all calls for `sqnr_db`, 1 - value for `ssim`.
        seconds: spent on this row.
        seed: of the recorded calls.
    """

    kind: Kind
    layer: str
    label: str
    bits: int
    metric: Metric
    value: float
    loss: float
    seconds: float
    seed: int

    @property
    def place(self) -> Place:
        """Which row of the table this is."""
        return self.kind, self.layer, self.label


@dataclass(frozen=True)
class Table:
    """The rows that a file holds.

    Attributes:
        key: hash of what they depend on.
        about: what the header says beside it: JSON values.
        rows: in the order of the file.
    """

    key: str
    about: Mapping[str, Any]
    rows: tuple[Row, ...]

    @cached_property
    def _places(self) -> dict[Place, Row]:
        return {row.place: row for row in self.rows}

    def at(self, kind: Kind, layer: str, label: str) -> Row | None:
        """Return a row, or None where it is not there."""
        return self._places.get((kind, layer, label))


def read_table(path: Path) -> Table:
    """Read a table, finished or not; a line that a kill has torn is left out.

    Raises:
        SourceError: no such file, not a table, damaged, or with values that are not finite.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _parse(path, content)[0]


def whole_table(path: Path, key: str, places: Sequence[Place]) -> Table:
    """Read a table that somebody gave; it is never written to.

    Args:
        path: of the table.
        key: hash of what the rows must depend on.
        places: of the rows that it must have.

    Returns:
        The table with these rows, in their order.

    Raises:
        SourceError: see `read_table`; or it is the table of another key, or unfinished.
    """
    table = read_table(path)
    if table.key != key:
        raise _other_key(path, table.key, key)
    found = {row.place: row for row in table.rows}
    rows = tuple(found[place] for place in places if place in found)
    if len(rows) < len(places):
        raise SourceError(f"{path}: unfinished: {len(rows)} of {len(places)} rows are there", hint=_MEASURE)
    return Table(table.key, table.about, rows)


@contextmanager
def appending(
    path: Path, key: str, about: Mapping[str, Any], *, replace: bool
) -> Iterator[tuple[Table, Callable[[Row], None]]]:
    """Open a table to go on with; yield what it holds so far, and what appends a row.

    A row is in the file, whole, when the call that appends it returns: it survives a kill. What a kill
    has torn is cut off first. The file is locked meanwhile.

    Args:
        path: of the table; made where there is none.
        key: hash of what the rows depend on.
        about: for the header of a new table; JSON values.
        replace: begin anew where the file is the table of another key, or a damaged one.

    Raises:
        SourceError: the file is the table of another key, damaged, no table at all, or in use.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceError(f"{path}: another process is writing this table", hint="wait for it") from None
        kept = _resume(path, key, replace)
        table, end = kept or (Table(key, dict(about), ()), 0)
        stream.truncate(end)
        if kept is None:
            _append(stream, {"format": FORMAT, "version": VERSION, "key": key, **about})

        def append(row: Row) -> None:
            _append(stream, asdict(row))

        yield table, append
        os.fsync(stream.fileno())


def _append(stream: Any, values: Mapping[str, Any]) -> None:
    stream.write((json.dumps(values, allow_nan=False) + "\n").encode())


def _resume(path: Path, key: str, replace: bool) -> tuple[Table, int] | None:
    """Return the table to go on with and how many bytes of the file to keep; None: begin anew."""
    try:
        table, end = _parse(path, path.read_bytes())
    except _Empty:
        return None
    except _Foreign:
        raise  # never overwritten, whatever it is
    except SourceError:
        if replace:
            return None
        raise
    if table.key != key:
        if replace or not table.rows:  # a header alone is nothing to keep
            return None
        raise _other_key(path, table.key, key)
    return table, end


def _other_key(path: Path, found: str, key: str) -> SourceError:
    return SourceError(
        f"{path}: these sensitivities were measured on something else: another model, calibration, set of"
        f" candidates, or version (key {found[:12]}, now {key[:12]})",
        hint=_MEASURE,
    )


class _Empty(SourceError):
    """Not even the header is whole."""


class _Foreign(SourceError):
    """The file is something else."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: not a table of sensitivities", hint=_MEASURE)


def _parse(path: Path, content: bytes) -> tuple[Table, int]:
    """Return the table and the length of its whole lines."""
    end = content.rfind(b"\n") + 1
    lines = content[:end].splitlines()
    if not lines:
        if not _BEGINNING.startswith(content[: len(_BEGINNING)]):
            raise _Foreign(path)
        raise _Empty(f"{path}: the table is empty")
    if not lines[0].startswith(_BEGINNING):
        raise _Foreign(path)
    header = _object(path, 1, lines[0])
    if not isinstance(header.get("key"), str):
        raise SourceError(f"{path}:1: damaged: the header has no key", hint="delete the table")
    if header.get("version") != VERSION:
        raise SourceError(f"{path}: version {header.get('version')!r} of the table, this reads {VERSION}")
    rows: dict[Place, Row] = {}
    for number, line in enumerate(lines[1:], 2):
        row = _row(path, number, _object(path, number, line))
        if row.place in rows:
            raise SourceError(f"{path}:{number}: {row.kind} {row.label} of {row.layer} is there twice")
        rows[row.place] = row
    about = {name: value for name, value in header.items() if name not in ("format", "version", "key")}
    return Table(header["key"], about, tuple(rows.values())), end


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise SourceError(f"{path}:{number}: damaged: not a JSON object", hint="delete the table")
    return value


_TYPES: Mapping[str, tuple[type, ...]] = {
    "kind": (str,), "layer": (str,), "label": (str,), "bits": (int,), "metric": (str,),
    "value": (int, float), "loss": (int, float), "seconds": (int, float), "seed": (int,),
}  # fmt: skip


def _row(path: Path, number: int, values: dict[str, Any]) -> Row:
    typed = set(values) == set(_TYPES) and all(
        isinstance(values[name], types) and not isinstance(values[name], bool)
        for name, types in _TYPES.items()
    )
    if (
        not typed
        or values["kind"] not in ("weight", "activation")
        or values["metric"] not in ("sqnr_db", "ssim")
    ):
        raise SourceError(f"{path}:{number}: damaged: not a row of sensitivities", hint="delete the table")
    for name in ("value", "loss", "seconds"):
        if not math.isfinite(values[name]):
            raise SourceError(
                f"{path}:{number}: the {name} of {values['kind']} {values['label']} of {values['layer']} is"
                f" {values[name]}",
                hint="delete the table and measure again",
            )
    return Row(**values)
