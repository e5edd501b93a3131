"""What pruning has to know about a model that its modules do not say themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Meaning = Literal["heads", "head_dim", "width", "scale"]


@dataclass(frozen=True)
class AttentionSite:
    """One multi-head attention, as it is now.

    Attributes:
        name: of the module whose attributes say how many heads there are.
        block: index of its block.
        q, k, v, out: names of the linears; q, k and v have heads * head_dim outputs, head by head.
        heads, head_dim: number of heads, and channels of each.
        attributes: attribute of the module -> what it holds (width: heads * head_dim).
        table: name of a parameter [positions, heads] with a column per head; None where there is none.
    """

    name: str
    block: int
    q: str
    k: str
    v: str
    out: str
    heads: int
    head_dim: int
    attributes: Mapping[str, Meaning]
    table: str | None = None


@dataclass(frozen=True)
class PrunableStructure:
    """What may be removed from a model.

    Attributes:
        attentions: in forward order.
        inner: linear whose outputs are the inner channels of a feed-forward network -> its block.
        ignored: modules and parameters of which nothing is removed, by name.
        width: whether channels of the residual stream can be removed.
    """

    attentions: tuple[AttentionSite, ...]
    inner: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    width: bool = True
