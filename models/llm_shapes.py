"""The tensors that the config of a language model implies, without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.language_config import LanguageShape, language_shape
from .tensor_names import Named, linear


def language_tensors(config: Mapping[str, Any]) -> Named:
    """Yield the state dict's names and shapes; a tied head is among them.

    Args:
        config: completed by `complete_language_config`.
    """
    shape = language_shape(config)
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.width)
    for index in range(shape.layers):
        yield from _block(f"model.layers.{index}", shape)
    yield "model.norm.weight", (shape.width,)
    yield "lm_head.weight", (shape.vocabulary, shape.width)


def _block(name: str, shape: LanguageShape) -> Named:
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield from linear(f"{attention}.q_proj", queries, shape.width, shape.qkv_bias)
    yield from linear(f"{attention}.k_proj", keys, shape.width, shape.qkv_bias)
    yield from linear(f"{attention}.v_proj", keys, shape.width, shape.qkv_bias)
    yield from linear(f"{attention}.o_proj", shape.width, queries, shape.out_bias)
    if shape.head_norms:
        yield f"{attention}.q_norm.weight", (shape.head_dim,)
        yield f"{attention}.k_norm.weight", (shape.head_dim,)
    yield from linear(f"{mlp}.gate_proj", shape.inner, shape.width, shape.mlp_bias)
    yield from linear(f"{mlp}.up_proj", shape.inner, shape.width, shape.mlp_bias)
    yield from linear(f"{mlp}.down_proj", shape.width, shape.inner, shape.mlp_bias)
    yield f"{name}.input_layernorm.weight", (shape.width,)
    yield f"{name}.post_attention_layernorm.weight", (shape.width,)
