"""Reading compressed values without rebuilding them.

Values are v = B_V c + b per KV head, and what an attention reads is linear in them: sum_j p_j v_j =
B_V (sum_j p_j c_j) + b sum_j p_j. So the probabilities average the compressed states themselves, per query
head, and B_V is applied to one vector per query; or it is one matrix with o_proj. Equal outputs, no rebuilt
values. Keys cannot be absorbed: the rotation by position stands between the query and B_K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from .rebuild import factors_below


def attended_values(attention: nn.Module, probabilities: Tensor, c: Tensor) -> Tensor:
    """Return what queries read of compressed tokens, as if their values had been rebuilt.

    Args:
        attention: of stock code, with factors.
        probabilities: [batch, query heads, queries, tokens] of these tokens. They need not sum to one: other
            tokens may be read exactly, and their part is added to this one before o_proj.
        c: compressed values [batch, tokens, rank].

    Returns:
        [batch, query heads, queries, head_dim].

    Raises:
        PlanError: the attention clips its values.
    """
    factor, bias = _value_heads(attention)
    read = (probabilities @ c[:, None]) @ factor.transpose(1, 2)
    if bias is None:
        return read
    return read + probabilities.sum(dim=-1, keepdim=True) * bias[:, None].to(read.dtype)


@dataclass(frozen=True)
class AbsorbedOutput:
    """o_proj after B_V, as one matrix per query head.

    It has query heads * rank columns where o_proj has query heads * head_dim: more, wherever the rank is
    above a head's channels.

    Attributes:
        weight: [query heads, h, rank].
        bias: of the values, after o_proj, [query heads, h]; None where values have none.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, attention: Any) -> AbsorbedOutput:
        """Multiply the matrices of an attention whose o_proj is a floating-point linear.

        Raises:
            PlanError: the attention clips its values.
        """
        factor, bias = _value_heads(attention)
        out = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
        after = None if bias is None else (out @ bias[..., None].to(out.dtype)).squeeze(-1)
        return cls(out @ factor, after)

    def read(self, probabilities: Tensor, c: Tensor) -> Tensor:
        """Return the part of the attention's output that compressed tokens make, o_proj's own bias left out.

        Args:
            probabilities, c: as of `attended_values`.

        Returns:
            [batch, queries, h].
        """
        read = torch.einsum("bnqr,nhr->bqh", probabilities @ c[:, None], self.weight)
        if self.bias is None:
            return read
        return read + torch.einsum("bnq,nh->bqh", probabilities.sum(dim=-1), self.bias)


def _value_heads(attention: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return B_V [query heads, head_dim, rank] and the bias [query heads, head_dim] of the values."""
    if getattr(attention.config, "clip_qkv", None) is not None:
        raise PlanError("values that are clipped (clip_qkv) cannot be averaged before their second factor")

    def per_query_head(tensor: Tensor) -> Tensor:
        heads = tensor.unflatten(0, (-1, attention.head_dim))
        return heads.repeat_interleave(attention.num_key_value_groups, dim=0)

    bias = getattr(attention.v_proj, "bias", None)
    factor = per_query_head(factors_below(attention).v_b.weight)
    return factor, None if bias is None else per_query_head(bias)
