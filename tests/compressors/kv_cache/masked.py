"""Teacher-forced decoding of a Llama with two branches, in one masked pass over whole sequences.

Written from the method's definition (arXiv 2409.10593, mode sliding), for figures: nothing of
`compress.runtime.kv` runs here. Of earlier tokens the latest `window` are read exactly, as is the token
itself; all others are read from keys and values that two factors give back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compress.compressors.kv_cache.factorise import KvFactors
from torch import Tensor, nn
from torch.nn import functional as F


def mean_loss(
    module: nn.Module, ids: Tensor, factors: Mapping[str, KvFactors] | None, window: int = 0
) -> float:
    """Return the mean negative log-likelihood in nats of tokens [sequences, tokens], the first ones left out.

    Args:
        module: a Llama with one dtype, float32.
        ids: [sequences, tokens] int64.
        factors: attention -> its factors; None: keys and values are exact everywhere.
        window: latest tokens before the query that are read exactly.
    """
    with torch.no_grad():
        found = _logits(module, ids, factors, window)
    return float(F.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def _logits(module: nn.Module, ids: Tensor, factors: Mapping[str, KvFactors] | None, window: int) -> Tensor:
    config, tokens = module.config, ids.shape[1]
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rate = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    angle = (torch.arange(tokens)[:, None] * rate).repeat(1, 2)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    seen, near = distance >= 0, distance <= window

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    def by_head(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, dim)).transpose(1, 2).repeat_interleave(heads // count, dim=1)

    x = module.model.embed_tokens(ids)
    for index, layer in enumerate(module.model.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        q = rotated(by_head(attention.q_proj(h), heads)) / dim**0.5
        k, v = by_head(attention.k_proj(h), kv_heads), by_head(attention.v_proj(h), kv_heads)
        scores, far_v = q @ rotated(k).mT, v
        if factors is not None:
            pair_k, pair_v = (
                factors[f"model.layers.{index}.self_attn"].k,
                factors[f"model.layers.{index}.self_attn"].v,
            )
            far_k = by_head(h @ pair_k.a.T @ pair_k.b.T, kv_heads)
            far_v = by_head(h @ pair_v.a.T @ pair_v.b.T, kv_heads)
            scores = torch.where(near, scores, q @ rotated(far_k).mT)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        read = (weights * near) @ v + (weights * ~near) @ far_v
        x = x + attention.o_proj(read.transpose(1, 2).flatten(2))
        h = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return module.lm_head(module.model.norm(x))
