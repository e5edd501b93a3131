"""The tensors that the config of a mixture of experts implies, and how many parameters those are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ..runtime.mapped_routing import MAPPING
from ..runtime.moe_config import HeadsShape, LatentShape, MoeShape, moe_shape
from .tensor_names import Named, linear

CORRECTION = "e_score_correction_bias"
"""Of a router: a buffer that stock classes store, and keep in float32 whatever the model's dtype."""


def moe_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes; a tied head is among them, experts are fused.

    Args:
        config: completed by `complete_moe_config`.
    """
    shape = moe_shape(config)
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for layer in range(shape.layers):
        yield from _layer(f"model.layers.{layer}", shape, dense=layer in shape.dense)
    yield from _norm("model.norm", shape.width, shape.norm_bias)
    yield from linear("lm_head", shape.vocabulary, shape.width, shape.head_bias)


def total_parameters(config: Mapping[str, Any]) -> int:
    """Count all parameters, a tied head once; the correction of a router's choice is none.

    Args:
        config: completed by `complete_moe_config`.
    """
    return _count(moe_shape(config), config)


def active_parameters(config: Mapping[str, Any]) -> int:
    """Count the parameters that one token meets: those of its experts alone, and all that is no expert.

    Args:
        config: completed by `complete_moe_config`.
    """
    shape = moe_shape(config)
    idle = shape.routing.experts - shape.routing.active
    return _count(shape, config) - idle * len(shape.sparse) * expert_parameters(shape)


def expert_parameters(shape: MoeShape) -> int:
    """Count the parameters of one expert of one layer, its router's row not among them."""
    one = replace(shape, routing=replace(shape.routing, experts=1))
    return sum(prod(tensor) for _, tensor in _experts("", one))


def _count(shape: MoeShape, config: Mapping[str, Any]) -> int:
    tied = shape.vocabulary * shape.width if shape.tied else 0
    return sum(prod(tensor) for name, tensor in moe_tensors(config) if not name.endswith(CORRECTION)) - tied


def _layer(name: str, shape: MoeShape, *, dense: bool) -> Named:
    if isinstance(shape.attention, LatentShape):
        yield from _latent_attention(f"{name}.self_attn", shape.attention, shape.width)
    else:
        yield from _attention(f"{name}.self_attn", shape.attention, shape.width)
    if dense:
        yield from _mlp(f"{name}.mlp", shape.width, shape.inner, shape.mlp_bias)
    else:
        yield from _mixture(f"{name}.mlp", shape)
    yield from _norm(f"{name}.input_layernorm", shape.width, shape.norm_bias)
    yield from _norm(f"{name}.post_attention_layernorm", shape.width, shape.norm_bias)


def _mixture(name: str, shape: MoeShape) -> Named:
    yield from _router(f"{name}.{shape.router}", shape)
    yield from _experts(f"{name}.experts.", shape)
    if shape.shared_inner:
        yield from _mlp(f"{name}.{shape.shared_name}", shape.width, shape.shared_inner, shape.mlp_bias)
    if shape.shared_gate:
        yield from linear(f"{name}.{shape.shared_name}_gate", 1, shape.width, False)


def _router(name: str, shape: MoeShape) -> Named:
    experts, weighed = shape.routing.experts, shape.routing.mapped_from
    for tensor, sizes in linear(name, weighed or experts, shape.width, shape.expert_bias):
        mapped = weighed is not None and len(sizes) == 2
        yield tensor, (1, *sizes) if mapped else sizes
    if weighed is not None:
        yield f"{name}.{MAPPING}", (experts, weighed)
    if shape.corrected:
        yield f"{name}.{CORRECTION}", (experts,)


def _experts(prefix: str, shape: MoeShape) -> Named:
    experts, width, inner = shape.routing.experts, shape.width, shape.expert_inner
    if not shape.expert_bias:
        yield f"{prefix}gate_up_proj", (experts, 2 * inner, width)
        yield f"{prefix}down_proj", (experts, width, inner)
        return
    yield f"{prefix}gate_up_proj", (experts, width, 2 * inner)
    yield f"{prefix}gate_up_proj_bias", (experts, 2 * inner)
    yield f"{prefix}down_proj", (experts, inner, width)
    yield f"{prefix}down_proj_bias", (experts, width)


def _attention(name: str, shape: HeadsShape, width: int) -> Named:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.sinks:
        yield f"{name}.sinks", (shape.heads,)
    yield from linear(f"{name}.q_proj", queries, width, shape.qkv_bias)
    yield from linear(f"{name}.k_proj", keys, width, shape.qkv_bias)
    yield from linear(f"{name}.v_proj", keys, width, shape.qkv_bias)
    yield from linear(f"{name}.o_proj", width, queries, shape.out_bias)
    if shape.norms:
        yield f"{name}.q_norm.weight", (shape.norms[0],)
        yield f"{name}.k_norm.weight", (shape.norms[1],)


def _latent_attention(name: str, shape: LatentShape, width: int) -> Named:
    queries = shape.heads * (shape.plain + shape.rotary)
    if shape.query_rank is None:
        yield from linear(f"{name}.q_proj", queries, width, False)
    else:
        yield from linear(f"{name}.q_a_proj", shape.query_rank, width, shape.bias)
        yield f"{name}.q_a_layernorm.weight", (shape.query_rank,)
        yield from linear(f"{name}.q_b_proj", queries, shape.query_rank, False)
    yield from linear(f"{name}.kv_a_proj_with_mqa", shape.value_rank + shape.rotary, width, shape.bias)
    yield f"{name}.kv_a_layernorm.weight", (shape.value_rank,)
    yield from linear(f"{name}.kv_b_proj", shape.heads * (shape.plain + shape.value), shape.value_rank, False)
    yield from linear(f"{name}.o_proj", width, shape.heads * shape.value, shape.bias)


def _mlp(name: str, width: int, inner: int, bias: bool) -> Named:
    yield from linear(f"{name}.gate_proj", inner, width, bias)
    yield from linear(f"{name}.up_proj", inner, width, bias)
    yield from linear(f"{name}.down_proj", width, inner, bias)


def _norm(name: str, width: int, bias: bool) -> Named:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)
