"""How much stays of every sub-structure: numbers alone, without saying which channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .groups import Group
from .heads import heads_of

Unit = Literal["width", "ff", "heads", "head_dim"]
"""What is counted of a layer."""


@dataclass(frozen=True)
class Widths:
    """Sizes of all groups of a model.

    Attributes:
        channels: name of a group that is no attention -> channels.
        heads: name of an attention -> heads.
        head_dims: name of an attention -> channels of each head.
    """

    channels: Mapping[str, int]
    heads: Mapping[str, int]
    head_dims: Mapping[str, int]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Widths:
        """Return the sizes as they are now."""
        attentions = [group for group in groups if group.kind == "attention"]
        return cls(
            {group.name: group.size for group in groups if group.kind != "attention"},
            {group.name: heads_of(group)[0] for group in attentions},
            {group.name: heads_of(group)[1] for group in attentions},
        )

    def flat(self) -> dict[str, int]:
        """Return group -> channels, of all heads together where it is an attention."""
        products = {name: heads * self.head_dims[name] for name, heads in self.heads.items()}
        return {**self.channels, **products}

    def size(self, group: str, unit: Unit) -> int:
        """Return the units of a group; of one that is no attention all units are its channels."""
        return self._of(group, unit)[group]

    def with_size(self, group: str, unit: Unit, size: int) -> Widths:
        """Return sizes in which a group has another one."""
        changed = {**self._of(group, unit), group: size}
        if group in self.channels:
            return replace(self, channels=changed)
        return replace(self, heads=changed) if unit == "heads" else replace(self, head_dims=changed)

    def _of(self, group: str, unit: Unit) -> Mapping[str, int]:
        if group in self.channels:
            return self.channels
        return self.heads if unit == "heads" else self.head_dims

    def at_least(self, other: Widths) -> Widths:
        """Return sizes of which none is below its counterpart in `other`."""
        return Widths(
            _larger(self.channels, other.channels),
            _larger(self.heads, other.heads),
            _larger(self.head_dims, other.head_dims),
        )


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: max(size, other[name]) for name, size in one.items()}
