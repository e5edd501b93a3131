"""Keys and values out of what the cache keeps of them, as an attention of stock code would have made them.

After the second factor comes all that stock attentions do between their projections and the cache: the
bias, a norm of the keys (per head, or over the whole width), a clip, and the rotation by position.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .factors import Factors
from .scheme import FACTORS

Angles = tuple[Tensor, Tensor]
"""cos and sin, as the model's rotary embedding gives them."""


def factors_below(attention: nn.Module) -> Factors:
    """Return the factors of an attention that has them."""
    found = attention.get_submodule(FACTORS)
    if not isinstance(found, Factors):
        raise TypeError(f"{FACTORS} is a {type(found).__name__}")
    return found


def rebuilt_values(attention: nn.Module, c: Tensor) -> Tensor:
    """Return values [batch, KV heads, tokens, head_dim] of compressed ones [batch, tokens, rank]."""
    values = _with_bias(factors_below(attention).v_b(c), attention.v_proj)
    return _heads(_clipped(values, attention), attention)


def rebuilt_keys(attention: nn.Module, c: Tensor, angles: Angles) -> Tensor:
    """Return keys [batch, KV heads, tokens, head_dim], normalised and rotated, of compressed ones.

    Args:
        attention: of stock code, with factors.
        c: [batch, tokens, rank].
        angles: of the tokens' positions, [batch or 1, tokens, ...].
    """
    keys: Any = _with_bias(factors_below(attention).k_b(c), attention.k_proj)
    norm = getattr(attention, "k_norm", None)
    per_head = norm is not None and norm.weight.shape[0] == attention.head_dim
    if norm is not None and not per_head:
        keys = norm(keys)
    keys = _heads(_clipped(keys, attention), attention)
    if norm is not None and per_head:
        keys = norm(keys)
    # The stock function rotates queries too: here there are none.
    return rotation_of(attention)(keys[:, :0], keys, *angles)[1]


def rotation_of(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function by which the attention's own modelling code rotates queries and keys."""
    for kind in type(attention).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    raise TypeError(f"{type(attention).__name__}: its modelling code has no apply_rotary_pos_emb")


def _with_bias(states: Tensor, projection: Any) -> Tensor:
    bias = getattr(projection, "bias", None)
    return states if bias is None else states + bias


def _clipped(states: Tensor, attention: Any) -> Tensor:
    bound = getattr(attention.config, "clip_qkv", None)
    return states if bound is None else states.clamp(min=-bound, max=bound)


def _heads(states: Tensor, attention: Any) -> Tensor:
    """Split [batch, tokens, width] into [batch, KV heads, tokens, head_dim]."""
    return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
