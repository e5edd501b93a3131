"""Causal language models of transformers: Llama, Mistral, Qwen2, Qwen3.

One adapter serves them all, because their modules have one structure and the same names: decoder layers
with an attention of four linears and a gated feed-forward network of three, each behind an RMSNorm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..runtime.language_config import LANGUAGE_CLASSES, language_shape
from ..runtime.transformers_config import implied_copies
from ..runtime.transformers_model import build_transformers_model
from .base import AS_CONFIGURED, Family, FoldGroup, LinearSite, Role, Shapes
from .transformer import (
    config_of,
    fold_into_norm,
    fold_into_rows,
    linear_shapes,
    product_macs,
    reference_of,
)

REFERENCE_TOKENS = 256
_LAYERS = "model.layers"
_HEAD = "lm_head"


class LanguageFamily(Family):
    """Adapter. The reference input is 256 tokens, or as many as the model takes.

    Attributes:
        block_roles: name of a linear inside a decoder layer and its role, in forward order.
    """

    name = "llm"
    class_names = tuple(LANGUAGE_CLASSES)
    library = "transformers"
    task = "language"
    tied = True
    block_roles: ClassVar[tuple[tuple[str, Role], ...]] = (
        ("self_attn.q_proj", "attention.q"),
        ("self_attn.k_proj", "attention.k"),
        ("self_attn.v_proj", "attention.v"),
        ("self_attn.o_proj", "attention.out"),
        ("mlp.gate_proj", "ff.gate"),
        ("mlp.up_proj", "ff.in"),
        ("mlp.down_proj", "ff.out"),
    )

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the stock module."""
        return build_transformers_model(config)

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear in forward order with its role, quantized ones included; the head last.

        Raises:
            KeyError: a linear that no role covers: the stock class has changed.
        """
        places = {
            f"{block}.{ending}": (index, rank)
            for index, (block, _) in enumerate(self.blocks(module))
            for rank, (ending, _) in enumerate(self.block_roles)
        }
        found: list[tuple[tuple[int, int], LinearSite]] = []
        head: list[LinearSite] = []
        for name, shape in linear_shapes(module):
            if name == _HEAD:
                head.append(LinearSite(name, "head", None, shape))
                continue
            if name not in places:
                raise KeyError(f"{name}: no role is known for this linear of a {type(module).__name__}")
            index, rank = places[name]
            found.append(((index, rank), LinearSite(name, self.block_roles[rank][1], index, shape)))
        return [site for _, site in sorted(found, key=lambda item: item[0])] + head

    def blocks(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The decoder layers in forward order."""
        return [
            (f"{_LAYERS}.{name}", block) for name, block in module.get_submodule(_LAYERS).named_children()
        ]

    def attentions(self, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The attention modules in forward order."""
        return [
            (f"{name}.self_attn", block.get_submodule("self_attn")) for name, block in self.blocks(module)
        ]

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the norms (inputs of attention and feed-forward), into V, and into the up projection.

        An RMSNorm ends with a product by its weight, and the feed-forward network with a product by the
        up projection, so both absorb any channel scale. V does where every query head has a value head of
        its own; where several share one, a factor of theirs would have to be the same.
        """
        config = config_of(module)
        own_values = config.num_attention_heads == config.num_key_value_heads
        groups = []
        for block, _ in self.blocks(module):
            qkv = tuple(f"{block}.self_attn.{letter}_proj" for letter in "qkv")
            groups.append(fold_into_norm(qkv, f"{block}.input_layernorm"))
            if own_values:
                groups.append(fold_into_rows([f"{block}.self_attn.o_proj"], [f"{block}.self_attn.v_proj"]))
            gated = (f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj")
            groups.append(fold_into_norm(gated, f"{block}.post_attention_layernorm"))
            groups.append(fold_into_rows([f"{block}.mlp.down_proj"], [f"{block}.mlp.up_proj"]))
        return groups

    def example_inputs(self, module: nn.Module, batch: int, generator: torch.Generator) -> dict[str, Any]:
        """Random token ids [batch, tokens] int64; no cache is kept."""
        config, like = config_of(module), reference_of(module)
        tokens = min(REFERENCE_TOKENS, int(config.max_position_embeddings))
        drawn = torch.randint(
            int(config.vocab_size), (batch, tokens), generator=generator, device=generator.device
        )
        return {"input_ids": drawn.to(like.device), "use_cache": False}

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward over the reference tokens, the head's logits for every one included.

        Attention products are counted in full, as they are computed: no half is left out for causality.
        """
        shape = language_shape(config)
        tokens = min(REFERENCE_TOKENS, shape.positions)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        block = tokens * shape.width * (2 * queries + 2 * keys + 3 * shape.inner)
        if attention_products:
            block += product_macs(tokens, tokens, queries)
        return shape.layers * block + tokens * shape.width * shape.vocabulary

    def replicas(self, config: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """The head is the embedding where the config ties them."""
        return [(first, copy) for copy, first in implied_copies(config).items()]

    def default_keep(self) -> tuple[str, ...]:
        """The head; embeddings are no linears."""
        return (_HEAD,)
