"""Sub-structures: what can only be removed together; and the choice of what is removed.

A `Group` has `size` channels. Removing channel k removes, along one axis of every tensor that the group
touches, all positions that belong to k. An axis of a tensor belongs to one group at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...models.structure import AttentionSite

Kind = Literal["width", "ff", "attention"]


@dataclass(frozen=True)
class Slice:
    """One axis of one tensor.

    Attributes:
        module: dotted name of the module that owns the tensor.
        parameter: "weight" of a layer, or the name of a bare parameter. A layer's bias and whatever else
            follows its outputs have slices of their own.
        axis: of the tensor.
        owner: [length of the axis] int64, the channel that each position belongs to; -1: it always stays.
        scored: whether the importance of a channel is read off this tensor. False for biases, bare
            parameters, depthwise convolutions (as the official code does).
    """

    module: str
    parameter: str
    axis: int
    owner: Tensor
    scored: bool = True

    @property
    def tensor(self) -> str:
        """Name of the tensor in the state dict."""
        return f"{self.module}.{self.parameter}" if self.module else self.parameter

    def positions(self, kept: Tensor) -> Tensor:
        """Return the positions that stay, ascending int64.

        Args:
            kept: [size of the group] bool.
        """
        stays = torch.ones_like(self.owner, dtype=torch.bool)
        owned = self.owner >= 0
        stays[owned] = kept[self.owner[owned]]
        return stays.nonzero().flatten()


@dataclass(frozen=True)
class Group:
    """Channels that are removed through all tensors that depend on them.

    Attributes:
        name: of the layer whose outputs they are: stable between runs, unique, as in "vit.layers.0.mlp.fc1";
            of an attention: its query projection.
        kind: width (residual stream), ff (inner channels), attention (channels of heads, head by head).
        size: how many channels there are now.
        slices: every tensor that is cut.
        label: the ops on parameters in the order of the trace, such as ("Linear.out", "Linear.in"): groups
            with equal labels are isomorphic.
        block: index of its block, None for the residual stream.
        attention: of the kind `attention`.
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    label: tuple[str, ...]
    block: int | None = None
    attention: AttentionSite | None = None


@dataclass(frozen=True)
class Selection:
    """What stays of every group that loses something.

    Attributes:
        kept: group name -> channels that stay, ascending, counted in the group as it was before the cut. Of
            an attention: whole heads are absent, and all heads that stay keep equally many channels.
        heads: name of an attention group -> heads that stay, ascending.
        sizes: group name -> channels before the cut.
    """

    kept: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "kept": {name: list(kept) for name, kept in self.kept.items()},
            "heads": {name: list(heads) for name, heads in self.heads.items()},
            "sizes": dict(self.sizes),
        }

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        data = json.loads(text)
        try:
            return cls(
                {str(name): tuple(map(int, kept)) for name, kept in data["kept"].items()},
                {str(name): tuple(map(int, heads)) for name, heads in data["heads"].items()},
                {str(name): int(size) for name, size in data["sizes"].items()},
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a selection: {error}") from None

    def mask(self, name: str) -> Tensor:
        """Return [size of the group] bool: what stays of the group `name`."""
        mask = torch.zeros(self.sizes[name], dtype=torch.bool)
        mask[torch.tensor(self.kept[name], dtype=torch.int64)] = True
        return mask
