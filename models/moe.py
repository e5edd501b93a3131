"""Mixture-of-experts language models of transformers, one adapter for all of their classes.

Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Phi-MoE, GPT-OSS, DeepSeek-V2 and -V3: decoders as those of `llm`, in
which the feed-forward network of most layers, or of all, is a mixture of experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ..runtime.linear_experts import fuse_experts, split_experts, why_fused
from ..runtime.moe_classes import MOE_CLASSES
from ..runtime.moe_config import HeadsShape, LatentShape, MoeShape, moe_shape
from ..runtime.moe_names import expert_linear
from .base import AS_CONFIGURED, FoldGroup, LinearSite, Role, Shapes, TensorSpec
from .llm import REFERENCE_TOKENS, LanguageFamily
from .mixtures import mixtures
from .moe_folds import moe_folds
from .moe_shapes import active_parameters
from .split_experts import fused_tensors, split_tensors
from .transformer import linear_shapes, product_macs

_ROLES: Sequence[tuple[str, Role]] = (
    ("self_attn.q_proj", "attention.q"),
    ("self_attn.q_a_proj", "attention.q"),
    ("self_attn.q_b_proj", "attention.q"),
    ("self_attn.k_proj", "attention.k"),
    ("self_attn.kv_a_proj_with_mqa", "attention.k"),
    ("self_attn.kv_b_proj", "attention.v"),
    ("self_attn.v_proj", "attention.v"),
    ("self_attn.o_proj", "attention.out"),
    ("mlp.router", "router"),
    (r"mlp.experts.\d+.gate_proj", "ff.gate"),
    (r"mlp.experts.\d+.up_proj", "ff.in"),
    (r"mlp.experts.\d+.down_proj", "ff.out"),
    ("mlp.gate_proj", "ff.gate"),
    ("mlp.up_proj", "ff.in"),
    ("mlp.down_proj", "ff.out"),
    ("mlp.shared_experts?.gate_proj", "ff.gate"),
    ("mlp.shared_experts?.up_proj", "ff.in"),
    ("mlp.shared_experts?.down_proj", "ff.out"),
    ("mlp.shared_expert_gate", "router"),
)
"""Regular expression of a linear's name in a decoder layer -> role, in the order of a forward."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HEAD = "lm_head"
_EXPERTS = next(rank for rank, (ending, _) in enumerate(_ROLES) if ".experts." in ending)


class MoeFamily(LanguageFamily):
    """Adapter. The reference input is that of `llm`. Experts are no linears of their own until `split`."""

    name = "moe"
    class_names = tuple(MOE_CLASSES)
    block_roles: ClassVar[tuple[tuple[str, Role], ...]] = tuple(_ROLES)

    def linears(self, module: nn.Module) -> list[LinearSite]:
        """Every linear with its role, layer by layer, the head last; fused experts are none.

        Raises:
            KeyError: a linear that no role covers: the stock class has changed.
        """
        found: list[tuple[tuple[int, int, int], LinearSite]] = []
        head: list[LinearSite] = []
        for name, shape in linear_shapes(module):
            if name == _HEAD:
                head.append(LinearSite(name, "head", None, shape))
                continue
            index, rank = self._place(name, module)
            expert = expert_linear(name)
            role = self.block_roles[rank][1]
            # Of one expert the modules stand in the order of a forward, which sorting keeps.
            place = (index, rank, 0) if expert is None else (index, _EXPERTS, expert[1])
            found.append((place, LinearSite(name, role, index, shape)))
        return [site for _, site in sorted(found, key=lambda item: item[0])] + head

    def _place(self, name: str, module: nn.Module) -> tuple[int, int]:
        match = _LAYER.fullmatch(name)
        for rank, (ending, _) in enumerate(self.block_roles):
            if match is not None and re.fullmatch(ending, match[2]):
                return int(match[1]), rank
        raise KeyError(f"{name}: no role is known for this linear of a {type(module).__name__}")

    def folds(self, module: nn.Module) -> list[FoldGroup]:
        """Fold into the norms, V and the up projections, as `llm`; the router follows its norm.

        Into the norm before a mixture only where its experts are linears; see `moe_folds`.
        """
        return moe_folds(module, self.blocks(module))

    def split(self, module: nn.Module) -> nn.Module:
        """Make linears of all experts, but for those of `why_fused`."""
        split_experts(module)
        return module

    def fuse(self, module: nn.Module) -> nn.Module:
        """Let experts of which no layer is quantized be what the stock class has."""
        fuse_experts(module)
        return module

    def split_tensors(
        self, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
    ) -> dict[str, TensorSpec]:
        """Return the tensors with every expert's own in the place of the fused ones."""
        return split_tensors(str(config["_class_name"]), tensors)

    def fused_tensors(
        self, tensors: Mapping[str, TensorSpec], quantized: Collection[str]
    ) -> dict[str, TensorSpec]:
        """Return the tensors with experts fused where none of their layers is quantized."""
        return fused_tensors(tensors, quantized)

    def beside_linears(self, module: nn.Module) -> list[str]:
        """Name the routers, which are no linears in most classes, and experts that stay fused."""
        found = mixtures(module)
        notes = []
        if any(not isinstance(mixture.router, nn.Linear) for mixture in found):
            notes.append("routers stay in floating point: they decide which experts a token meets")
        reasons = dict.fromkeys(why_fused(mixture.experts) for mixture in found)
        for reason in filter(None, reasons):
            notes.append(f"experts of {type(module).__name__} stay in floating point: {reason}")
        return notes

    def macs(
        self, config: Mapping[str, Any], *, attention_products: bool = True, shapes: Shapes = AS_CONFIGURED
    ) -> int:
        """Count one forward over the reference tokens, in which every token goes through its experts alone.

        Attention products are counted in full, as for `llm`.
        """
        shape = moe_shape(config)
        tokens = min(REFERENCE_TOKENS, shape.positions)
        per_token = shape.layers * _attention_weights(shape.attention, shape.width)
        per_token += len(shape.dense) * 3 * shape.width * shape.inner
        per_token += len(shape.sparse) * _mixture_weights(shape)
        per_token += shape.width * shape.vocabulary
        products = _products(shape.attention, tokens) if attention_products else 0
        return tokens * per_token + shape.layers * products

    def active_parameters(self, config: Mapping[str, Any]) -> int:
        """Count the parameters that one token meets: all but those of the experts that it skips."""
        return active_parameters(config)


def _mixture_weights(shape: MoeShape) -> int:
    """Weights that one token meets in a mixture: router and mapping, experts, shared ones and their gate."""
    inner = shape.routing.active * shape.expert_inner + shape.shared_inner
    experts, weighed = shape.routing.experts, shape.routing.mapped_from
    mapping = 0 if weighed is None else experts * weighed
    return shape.width * ((weighed or experts) + 3 * inner + (1 if shape.shared_gate else 0)) + mapping


def _attention_weights(attention: HeadsShape | LatentShape, width: int) -> int:
    if isinstance(attention, HeadsShape):
        return 2 * width * attention.head_dim * (attention.heads + attention.kv_heads)
    queries = attention.heads * (attention.plain + attention.rotary)
    rank = attention.query_rank
    count = width * queries if rank is None else rank * (width + queries)
    count += width * (attention.value_rank + attention.rotary)
    count += attention.value_rank * attention.heads * (attention.plain + attention.value)
    return count + width * attention.heads * attention.value


def _products(attention: HeadsShape | LatentShape, tokens: int) -> int:
    if isinstance(attention, HeadsShape):
        return product_macs(tokens, tokens, attention.heads * attention.head_dim)
    channels = attention.plain + attention.rotary + attention.value
    return tokens * tokens * attention.heads * channels
