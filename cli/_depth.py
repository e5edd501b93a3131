"""What stages that removed whole blocks say of it: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..exporters.depth_table import (
    blocks_of,
    groups_told,
    is_learned,
    least_confidence,
    named,
    places_told,
    rows_of,
    several_lists,
)
from ._tables import Section, Table

Document = Mapping[str, Any]


def lines(stage: Document) -> Iterator[Section]:
    """Yield a line for every list of blocks that became shorter, and a table of a choice's groups.

    Args:
        stage: with details of a stage that removed blocks.
    """
    details = stage["details"]
    for kept in _kept(details):
        yield f"{stage['method']}: {kept}"
    found = groups_told(details)
    if len(found) > 1:
        several = several_lists(details)
        rows = [
            [
                f"{row['blocks'] if several else ''} {places_told(row['of'])}".strip(),
                places_told(row["kept"]),
                f"{row['confidence']:.2f}",
            ]
            for row in found
        ]
        columns = ["group of blocks", "kept", "probability"]
        yield Table(f"{stage['method']}: how sure every choice is", columns, rows)


def short(stage: Document) -> str:
    """Return all in one line, for a history."""
    details = stage["details"]
    return f"{stage['method']}: {'; '.join(_kept(details))}"


def _kept(details: Document) -> list[str]:
    return [
        f"{_which(name)}kept {row.told}{_sure(details, row.name)}" for name, row in named(blocks_of(details))
    ]


def _which(name: str) -> str:
    return f"{name}: " if name else ""


def of_original(depth: Mapping[str, Any]) -> str:
    """Say how many blocks of the original a checkpoint has: "4 of 8 blocks of the original: 0, 2, 5, 7".

    Args:
        depth: list of blocks -> `of` and `kept`, as `inspect` tells it.
    """
    return "; ".join(f"{_which(name)}{row.told_of_original}" for name, row in named(rows_of(depth)))


def _sure(details: Document, name: str) -> str:
    least = least_confidence(details, name)
    if is_learned(details) and least is not None:
        return f" (least confidence {least:.2f})"
    return f", by {details['by']}" if "by" in details else ""
