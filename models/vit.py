"""ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877), with and without distillation head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..runtime.vision_config import vit_shape
from .base import FoldGroup, Shapes
from .classifier import ATTENTION_ROLES, ImageClassifier
from .structure import PrunableStructure
from .transformer import fold_into_norm, fold_into_rows, product_macs

_ROOTS = ("vit", "deit")


class ViTFamily(ImageClassifier):
    """Adapter."""

    name = "vit"
    class_names = (
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    )
    roles = ATTENTION_ROLES
    inner = "mlp.fc1"

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The transformer layers in forward order."""
        root = next(name for name, _ in module.named_children() if name in _ROOTS)
        layers = module.get_submodule(f"{root}.layers")
        return [(f"{root}.layers.{name}", layer) for name, layer in layers.named_children()]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the norms before attention and feed-forward network, and into V.

        The input of fc2 comes from a GELU, which no scale passes.
        """
        groups = []
        for block, _ in self.blocks(module):
            qkv = [f"{block}.attention.{letter}_proj" for letter in "qkv"]
            groups += [
                fold_into_norm(qkv, f"{block}.layernorm_before"),
                fold_into_rows([f"{block}.attention.o_proj"], [f"{block}.attention.v_proj"]),
                fold_into_norm([f"{block}.mlp.fc1"], f"{block}.layernorm_after"),
            ]
        return groups

    def positions(self, config: Mapping[str, Any]) -> Callable[[str], int]:
        """Patches for the embedding, tokens for the layers, one for the classifiers."""
        shape = vit_shape(config)
        patches = shape.tokens - shape.special_tokens

        def count(name: str) -> int:
            if name.startswith(f"{shape.root}.embeddings."):
                return patches
            return shape.tokens if name.startswith(f"{shape.root}.layers.") else 1

        return count

    def product_macs(self, config: Mapping[str, Any], sizes: Shapes) -> int:
        """Count over all tokens of an image."""
        shape = vit_shape(config)
        return sum(
            product_macs(shape.tokens, shape.tokens, size[0])
            for name, size in sizes.items()
            if name.endswith(".attention.q_proj.weight")
        )

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Residual width, heads, their channels, and inner channels of the feed-forward networks."""
        return PrunableStructure(
            self.attention_sites(module), self.inner_linears(module), tuple(self.classifiers(module))
        )
