"""What stages that removed whole blocks tell in a report, for card, pictures and terminal. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]

RULES = {
    "indices": "a list of the recipe's own",
    "oracle": "of every pair the first stays in the first half of the model, the second in the second",
    "shortgpt": "the blocks that turn their input least went (ShortGPT)",
    "flux_lite": "the blocks that change their input least went (Flux.1 Lite)",
    "sensitivity": "the blocks without which the loss rises least went",
    "random": "one of many random choices, by its loss",
}
"""Rule of the stage `depth` -> what it does."""

LEARNS_BESIDE = {
    "lora": "low-rank changes of all linear layers learned beside the choice, and were thrown away",
    "full": "all weights learned beside the choice, and were put back",
    "frozen": "nothing else learned",
}
"""Mode of the stage `tinyfusion` -> what the weights did meanwhile."""


@dataclass(frozen=True)
class Blocks:
    """A list of blocks that became shorter.

    Attributes:
        name: of the list in the module.
        of: blocks before.
        kept: places of those that stay, counted from 0 before.
    """

    name: str
    of: int
    kept: tuple[int, ...]

    @property
    def told(self) -> str:
        """As people write it: "4 of 8 blocks: 0, 2, 5, 7"."""
        return self._told("blocks")

    @property
    def told_of_original(self) -> str:
        """The same of places in the original: "4 of 8 blocks of the original: 0, 2, 5, 7"."""
        return self._told("blocks of the original")

    def _told(self, what: str) -> str:
        return f"{len(self.kept)} of {self.of} {what}: {places_told(self.kept)}"


def places_told(places: Sequence[int]) -> str:
    """Return places of blocks as people write them: "0, 2, 5, 7"."""
    return ", ".join(map(str, places))


def removals(document: Document) -> list[Document]:
    """Return the stages that removed blocks, in order."""
    return [stage for stage in document.get("stages", ()) if (stage.get("details") or {}).get("blocks")]


def blocks_of(details: Document) -> list[Blocks]:
    """Return the lists of a stage that became shorter.

    Args:
        details: of a stage that removed blocks.
    """
    return [row for row in rows_of(details["blocks"]) if len(row.kept) < row.of]


def rows_of(told: Mapping[str, Document]) -> list[Blocks]:
    """Return lists of blocks from what a document says: list -> `of` and `kept`."""
    return [Blocks(name, row["of"], tuple(row["kept"])) for name, row in told.items()]


def left_of_original(document: Document) -> list[Blocks]:
    """Return the lists that became shorter, with the places in the original of what is left.

    Where the run began with what earlier ones had made shorter, the original is what those began with.
    """
    found = {row.name: row for row in rows_of(earlier(document).get("blocks", {}))}
    for stage in removals(document):
        for row in blocks_of(stage["details"]):
            before = found.get(row.name, Blocks(row.name, row.of, tuple(range(row.of))))
            found[row.name] = Blocks(row.name, before.of, tuple(before.kept[place] for place in row.kept))
    return list(found.values())


def earlier(document: Document) -> Document:
    """Return what the source of a run says of blocks that went before: `blocks`, `removals`; or nothing."""
    found: Document = document["model"].get("depth", {})
    return found


def named(rows: Sequence[Blocks]) -> list[tuple[str, Blocks]]:
    """Return (what to call it, list): nothing where there is one alone."""
    return [("" if len(rows) == 1 else row.name, row) for row in rows]


def is_learned(details: Document) -> bool:
    """Tell whether the choice was learned, group by group."""
    return bool(details.get("choices"))


def least_confidence(details: Document, name: str | None = None) -> float | None:
    """Return the least probability that a learned group gives what stays; None where nothing was learned.

    A group that stays whole has nothing to choose and is not counted.

    Args:
        details: of a stage that removed blocks.
        name: of the list whose groups count; None: all of them.
    """
    found = [row["confidence"] for row in groups_told(details) if name in (None, row["blocks"])]
    return min(found) if found else None


def several_lists(details: Document) -> bool:
    """Tell whether groups of a learned choice have to be told with the names of their lists."""
    return len({row["blocks"] for row in details.get("choices", ())}) > 1


def groups_told(details: Document) -> list[Document]:
    """Return the groups of a learned choice in which there was something to choose."""
    return [row for row in details.get("choices", ()) if chooses(row)]


def chooses(row: Document) -> bool:
    """Tell whether there is something to choose in a group of a learned choice."""
    return len(row["kept"]) < len(row["of"])
