"""Who competes with whom.

Isomorphic Pruning (arXiv 2407.04616) ranks sub-structures of one form among themselves. Two are of one form
when their operations are the same in the same order; sizes do not matter. Only operations with parameters
count here, where torch-pruning counts views and sums as well: its shifted and unshifted windows of a Swin
are two classes, and the paper's definition gives one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .groups import Group

Ranking = Literal["isomorphic", "global", "local"]


def classes(groups: Sequence[Group], ranking: Ranking) -> dict[str, list[Group]]:
    """Divide the groups into those that are ranked together.

    Args:
        groups: in forward order.
        ranking: isomorphic: of one form; local: every group by itself; global: all of a kind.

    Returns:
        Name of the class -> its members in forward order; classes in the order of their first members. A
        class is called by its kind, numbered from 0 where there are several of a kind; in the local
        ranking, by its group.
    """
    if ranking == "local":
        return {group.name: [group] for group in groups}
    members: dict[tuple[str, tuple[str, ...]], list[Group]] = {}
    for group in groups:
        form = group.label if ranking == "isomorphic" else ()
        members.setdefault((group.kind, form), []).append(group)
    kinds = [kind for kind, _ in members]
    names = [
        kind if kinds.count(kind) == 1 else f"{kind}.{kinds[:index].count(kind)}"
        for index, kind in enumerate(kinds)
    ]
    return dict(zip(names, members.values(), strict=True))
