"""Which items are set apart so that equal ones stay together. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def hold_out(order: Sequence[int], contents: Sequence[Hashable], wanted: int) -> set[int]:
    """Choose items to set apart, from the end of an order; equal ones go together.

    Args:
        order: indices to choose from.
        contents: of every index; equal values mean equal items.
        wanted: how many at most; where even one item has more equals than that, the smallest group goes.

    Returns:
        Their indices; none of none.
    """
    groups: dict[Hashable, list[int]] = {}
    for row in order:
        groups.setdefault(contents[row], []).append(row)
    chosen: set[int] = set()
    for row in reversed(order):
        if row not in chosen and len(groups[contents[row]]) <= wanted - len(chosen):
            chosen.update(groups[contents[row]])
    if not chosen and groups and wanted > 0:
        smallest: list[int] = min(groups.values(), key=len)
        chosen.update(smallest)
    return chosen
