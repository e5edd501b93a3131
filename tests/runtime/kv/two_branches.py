"""Teacher-forced decoding with a compressed cache, worked out without one: a masked pass over all tokens.

Written for Llama from the method's definition. Every query chooses, per earlier token, between the exact
key and the one rebuilt out of the compressed state; nothing of `compress.runtime.kv` runs here but
`fake_quantize`, which has tests of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compress.runtime.kv.rounding import fake_quantize
from torch import Tensor
from torch.nn import functional as F


def reads_exact(starts: Tensor, tokens: int, window: int, mode: str) -> Tensor:
    """Which tokens a query reads exactly, [queries, tokens], by the tokens cached when its forward began."""
    exact = starts.clamp(max=window) if mode == "sliding" else starts % window
    return torch.arange(tokens)[None, :] >= (starts - exact)[:, None]


def logits(module: Any, ids: Tensor, factors: dict[str, Any], chunks: Sequence[int], scheme: Any) -> Tensor:
    """Logits [1, tokens, vocabulary] of tokens [1, tokens] that pass through the model in chunks."""
    tokens = ids.shape[1]
    assert sum(chunks) == tokens
    begins = torch.tensor([sum(chunks[:i]) for i in range(len(chunks))])
    starts = begins.repeat_interleave(torch.tensor(chunks))
    exact = reads_exact(starts, tokens, scheme.window, scheme.mode)
    if scheme.bits is None:
        packed = torch.zeros_like(exact)
    else:
        whole = starts // scheme.key_group * scheme.key_group
        packed = torch.arange(tokens)[None, :] < whole[:, None]
    seen = torch.ones(tokens, tokens).tril().bool()
    config, model = module.config, module.model
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.arange(tokens)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)

    def rotate(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    def split(x: Tensor, count: int) -> Tensor:
        return x.view(tokens, count, dim).transpose(0, 1).repeat_interleave(heads // count, dim=0)

    x = model.embed_tokens(ids[0])
    for index, layer in enumerate(model.layers):
        name, attention = f"model.layers.{index}.self_attn", layer.self_attn
        h = layer.input_layernorm(x)
        q = rotate(split(attention.q_proj(h), heads))
        keys, values = [split(attention.k_proj(h), kv_heads)], [split(attention.v_proj(h), kv_heads)]
        c_k = h @ factors[name].k_a.weight.T
        c_v = h @ factors[name].v_a.weight.T
        states = [(c_k, c_v)]
        if scheme.bits is not None:
            group = scheme.layers[name].value_group
            rounded_k = fake_quantize(c_k[None], scheme.bits, "tokens", scheme.key_group)[0]
            states.append((rounded_k, fake_quantize(c_v[None], scheme.bits, "channels", group)[0]))
        for k, v in states:
            keys.append(split(k @ factors[name].k_b.weight.T, kv_heads))
            values.append(split(v @ factors[name].v_b.weight.T, kv_heads))
        branches = [exact, ~exact & ~packed, ~exact & packed]
        scores = torch.zeros(heads, tokens, tokens)
        for chosen, k in zip(branches, keys, strict=False):
            scores = torch.where(chosen, q @ rotate(k).transpose(1, 2) / dim**0.5, scores)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        read = sum((weights * chosen) @ v for chosen, v in zip(branches, values, strict=False))
        x = x + attention.o_proj(read.transpose(0, 1).reshape(tokens, heads * dim))
        h = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return module.lm_head(model.norm(x))[None]
