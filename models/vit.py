"""ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877), with and without distillation head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import nn

from ..runtime.manifest import ModuleSurgery
from ..runtime.vision_sizes import VitShape, vit_shape
from .base import AS_CONFIGURED, FoldGroup, Shapes
from .classifier import ATTENTION_ROLES, ImageClassifier
from .native_config import Attributes, PrunedSizes, attention_attributes
from .shapes import expected_shapes
from .structure import PrunableStructure
from .transformer import product_macs

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
        return self.attention_folds(module)

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

    def paper_macs(self, config: Mapping[str, Any], *, shapes: Shapes = AS_CONFIGURED) -> int:
        """Count as torch-pruning does on the models of timm, where the published figures come from.

        Beside the products of `macs`: biases, norms, activations, the scaling of queries, softmax; and of
        an attention of d channels d * (d + 1) products per token for its output, where it computes d * D,
        too few once d is less than the width D. Shapes do not say into how many heads d is divided; as
        many of the config's size as hold it are assumed, which moves the sum by less than a thousandth.
        """
        shape = vit_shape(config)
        sizes = {**expected_shapes(config["_class_name"], config), **shapes}
        patch = sizes[f"{shape.root}.embeddings.patch_embeddings.projection.weight"]
        patches = shape.tokens - shape.special_tokens
        width = patch[0]
        count = patches * (prod(patch) + width) + shape.tokens * 2 * width
        for index in range(shape.layers):
            layer = f"{shape.root}.layers.{index}"
            inside = sizes[f"{layer}.attention.q_proj.weight"][0]
            inner = sizes[f"{layer}.mlp.fc1.weight"][0]
            count += _paper_layer(shape, width, inside, inner)
        return count + len(shape.classifiers) * (width + 1) * shape.images.labels

    def native_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say one inner width, one number of heads and one size of heads, where all layers have the same."""
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        layers = _layer_sizes(config, sizes)
        if any(layer != layers[0] for layer in layers):
            return None
        native = _resized(config, sizes, layers[0])
        return native if sizes.are_said_by(native, _attributes(native)) else None

    def layered_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say what differs between layers in `per_layer_config`; the largest sizes stand for the whole model.

        What neither says, as an attention's scale, is left to the manifest.
        """
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        layers = _layer_sizes(config, sizes)
        largest = {key: max(layer[key] for layer in layers) for key in layers[0]}
        varying = [key for key in largest if any(layer[key] != largest[key] for layer in layers)]
        if not varying:
            return None
        layered = {str(index): {key: layer[key] for key in varying} for index, layer in enumerate(layers)}
        # The library asks for a value of the whole model beside those of its layers.
        full = {**_resized(config, sizes, largest), "head_dim": largest["head_dim"]}
        return {**full, "per_layer_config": layered}

    def padded_config(
        self, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
    ) -> dict[str, Any] | None:
        """Say the largest sizes of all layers."""
        sizes = PrunedSizes.of(config, surgery, _attributes(config))
        layers = _layer_sizes(config, sizes)
        return _resized(config, sizes, {key: max(layer[key] for layer in layers) for key in layers[0]})

    def structure(self, module: nn.Module) -> PrunableStructure:
        """Residual width, heads, their channels, and inner channels of the feed-forward networks."""
        return PrunableStructure(
            self.attention_sites(module), self.inner_linears(module), tuple(self.classifiers(module))
        )


def _paper_layer(shape: VitShape, width: int, inside: int, inner: int) -> int:
    """Count one layer in the convention of the papers."""
    tokens, heads = shape.tokens, -(-inside // shape.head_dim)
    attention = tokens * inside * (1 + 3 * width + (3 if shape.qkv_bias else 0) + inside + 1)
    attention += tokens * tokens * (2 * inside + heads)
    feed_forward = tokens * inner * (2 * width + 1) + inner + width
    return attention + feed_forward + 2 * tokens * 2 * width


def _attributes(config: Mapping[str, Any]) -> Attributes:
    """Return what the stock attentions of a config compute with."""
    shape = vit_shape(config)
    values = attention_attributes(shape.heads, shape.head_dim)
    return {f"{shape.root}.layers.{index}.attention": values for index in range(shape.layers)}


def _layer_sizes(config: Mapping[str, Any], sizes: PrunedSizes) -> list[dict[str, int]]:
    """Return of every layer what a config can say of one."""
    shape = vit_shape(config)
    layers = []
    for name in (f"{shape.root}.layers.{index}" for index in range(shape.layers)):
        attention = sizes.attributes[f"{name}.attention"]
        layers.append(
            {
                "intermediate_size": sizes.shapes[f"{name}.mlp.fc1.weight"][0],
                "num_attention_heads": int(attention["num_attention_heads"]),
                "head_dim": int(attention["head_dim"]),
            }
        )
    return layers


def _resized(config: Mapping[str, Any], sizes: PrunedSizes, layer: Mapping[str, int]) -> dict[str, Any]:
    """Return the config with the width of the residual stream and the sizes of all layers."""
    width = sizes.shapes[f"{vit_shape(config).root}.embeddings.cls_token"][-1]
    native = {**config, **layer, "hidden_size": width}
    if "head_dim" not in config and width // layer["num_attention_heads"] == layer["head_dim"]:
        del native["head_dim"]  # what the library assumes
    if config.get("pooler_output_size") == config.get("hidden_size", 768):
        native["pooler_output_size"] = width  # of the pooler, which classifiers do not have
    return native
