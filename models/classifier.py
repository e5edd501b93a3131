"""What the adapters of image classifiers share: inputs, roles, attentions, counting work."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import nn

from ..runtime.vision_sizes import image_shape
from .base import AS_CONFIGURED, Family, FoldGroup, LinearSite, Role, Shapes
from .shapes import expected_shapes
from .stock_module import stock_module
from .structure import AttentionSite
from .transformer import (
    config_of,
    fold_into_norm,
    fold_into_rows,
    linear_shapes,
    random_normal,
    reference_of,
)

RoleRule = tuple[str, Role]
ATTENTION_ATTRIBUTES: Mapping[str, Any] = {
    "num_attention_heads": "heads", "head_dim": "head_dim", "scaling": "scale",
}  # fmt: skip
ATTENTION_ROLES: Sequence[RoleRule] = (
    ("attention.q_proj", "attention.q"),
    ("attention.k_proj", "attention.k"),
    ("attention.v_proj", "attention.v"),
    ("attention.o_proj", "attention.out"),
    ("mlp.fc1", "ff.in"),
    ("mlp.fc2", "ff.out"),
)
"""Of a block with an attention and a feed-forward network."""


class ImageClassifier(Family):
    """Base of the adapters. The reference input is one image of the config's size.

    Attributes:
        roles: (end of a linear's name, role) inside a block, in forward order.
        inner: end of the name of the linear whose outputs are a block's inner channels.
    """

    library = "transformers"
    task = "classify"
    roles: ClassVar[Sequence[RoleRule]]
    inner: ClassVar[str]

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module.

        Raises:
            SourceError: the config is refused, or the installed library builds the class otherwise.
        """
        return stock_module(config, expected_shapes(config["_class_name"], config))

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear in forward order with its role, quantized ones included; classifiers last.

        Raises:
            KeyError: a linear that no role covers: the stock class has changed.
        """
        shapes = dict(linear_shapes(module))
        found = [
            LinearSite(name, role, index, shapes.pop(name))
            for name, role, index in self._places(module)
            if name in shapes
        ]
        heads = [LinearSite(name, "head", None, shapes.pop(name)) for name in self.classifiers(module)]
        if shapes:
            raise KeyError(
                f"{next(iter(shapes))}: no role is known for this linear of a {type(module).__name__}"
            )
        return found + heads

    def attentions(self, module: nn.Module) -> list[tuple[str, Any]]:
        """The attention modules in forward order."""
        return [
            (f"{name}.attention", attention)
            for name, block in self.blocks(module)
            if (attention := getattr(block, "attention", None)) is not None
        ]

    def classifiers(self, module: nn.Module) -> list[str]:
        """Names of the linears that answer, in forward order."""
        return [name for name, child in module.named_children() if name.endswith("classifier")]

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random images [batch, channels, height, width]."""
        images = image_shape({**config_of(module).to_dict(), "_class_name": type(module).__name__})
        shape = (batch, images.channels, *images.size)
        return {"pixel_values": random_normal(shape, reference_of(module), generator)}

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """No tensor is a copy of another one."""
        return []

    def default_keep(self) -> tuple[str, ...]:
        """The classifiers."""
        return ("*classifier",)

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one image: linears and convolutions by their weights, and products of attentions.

        Norms, biases, softmax and the adding of tables are left out.
        """
        sizes = {**expected_shapes(config["_class_name"], config), **shapes}
        positions = self.positions(config)
        count = sum(
            positions(name) * prod(shape)
            for name, shape in sizes.items()
            if name.endswith(".weight") and len(shape) in (2, 4)
        )
        if attention_products:
            count += self.product_macs(config, sizes)
        return count

    @abstractmethod
    def positions(self, config: Mapping[str, Any]) -> Callable[[str], int]:
        """Return what tells how often the weight of a name is applied to one image."""

    def product_macs(self, config: Mapping[str, Any], sizes: Shapes) -> int:
        """Count Q K^T and the weighted sums of V over all attentions.

        Args:
            config: of the stock class.
            sizes: of all tensors, as they are.
        """
        return 0

    def _places(self, module: nn.Module) -> list[tuple[str, Role, int | None]]:
        """Return name, role and block of every linear that may be there, in forward order."""
        return [
            (f"{block}.{ending}", role, index)
            for index, (block, _) in enumerate(self.blocks(module))
            for ending, role in self.roles
        ]

    def attention_folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into both norms of every block of an encoder, and into V."""
        groups = []
        for block, _ in self.blocks(module):
            qkv = [f"{block}.attention.{letter}_proj" for letter in "qkv"]
            groups += [
                fold_into_norm(qkv, f"{block}.layernorm_before"),
                fold_into_rows([f"{block}.attention.o_proj"], [f"{block}.attention.v_proj"]),
                fold_into_norm([f"{block}.mlp.fc1"], f"{block}.layernorm_after"),
            ]
        return groups

    def inner_linears(self, module: nn.Module) -> dict[str, int]:
        """Return the linears whose outputs are inner channels -> their block."""
        return {f"{name}.{self.inner}": index for index, (name, _) in enumerate(self.blocks(module))}

    def attention_sites(self, module: nn.Module, table: str | None = None) -> tuple[AttentionSite, ...]:
        """Describe the attentions as they are now.

        Args:
            module: stock, perhaps pruned.
            table: name, inside an attention, of the parameter with a column per head.
        """
        names = [name for name, _ in self.blocks(module)]
        return tuple(
            AttentionSite(
                name=name, block=names.index(name.rpartition(".")[0]), q=f"{name}.q_proj", k=f"{name}.k_proj",
                v=f"{name}.v_proj", out=f"{name}.o_proj", heads=int(attention.num_attention_heads),
                head_dim=int(attention.head_dim), attributes=ATTENTION_ATTRIBUTES,
                table=None if table is None else f"{name}.{table}",
            )
            for name, attention in self.attentions(module)
        )  # fmt: skip
