"""Where the mixtures of experts of a model are: routers, experts, and what they are made of.

Found by structure, not by class: a feed-forward block with `experts` has, beside them, one module that
picks `top_k` of `num_experts`. Every tensor of the experts, and every one of the router, has an expert per
slice of its first axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

_LAYERS = "model.layers"
COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
"""Attributes of modules that say how many experts there are."""
ACTIVE_NAMES = ("top_k", "num_experts_per_tok")
"""Those that say how many a token goes through."""


@dataclass(frozen=True)
class Mixture:
    """One feed-forward block whose tokens go through a few experts each.

    Attributes:
        name: dotted name of the block.
        layer: index of its decoder layer.
        block: the block itself.
        router_name: of the router in the block.
    """

    name: str
    layer: int
    block: nn.Module
    router_name: str

    @cached_property
    def router(self) -> nn.Module:
        """What chooses; called with [..., width], it returns logits, weights and indices per token."""
        return self.block.get_submodule(self.router_name)

    @cached_property
    def experts(self) -> nn.Module:
        """What holds the experts; called with hidden states, indices and weights."""
        return self.block.get_submodule("experts")

    @property
    def count(self) -> int:
        """How many experts there are now."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def active(self) -> int:
        """How many a token goes through."""
        return int(self.router.top_k)  # type: ignore[arg-type]

    def router_tensors(self) -> dict[str, Tensor]:
        """Return name in the router -> tensor [experts, ...], a correction of the choice included."""
        return _own_tensors(self.router)

    def expert_tensors(self) -> dict[str, Tensor]:
        """Return name in the experts -> tensor [experts, ...]."""
        return _own_tensors(self.experts)


def mixtures(module: nn.Module) -> list[Mixture]:
    """Return the mixtures of a language model in forward order; dense layers have none."""
    found = []
    for index, (name, layer) in enumerate(module.get_submodule(_LAYERS).named_children()):
        block = getattr(layer, "mlp", None)
        if isinstance(block, nn.Module) and hasattr(block, "experts"):
            found.append(Mixture(f"{_LAYERS}.{name}.mlp", index, block, _router_name(block)))
    return found


def _router_name(block: nn.Module) -> str:
    names = [
        name
        for name, child in block.named_children()
        if name != "experts" and hasattr(child, "top_k") and hasattr(child, "num_experts")
    ]
    if len(names) != 1:
        raise TypeError(f"{type(block).__name__} has experts and {len(names)} routers instead of one")
    return names[0]


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {name: tensor.data for name, tensor in own}
