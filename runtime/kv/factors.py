"""The factors of one attention, as a module below it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .scheme import KvLayer


class Factor(nn.Module):
    """One factor. It is no `nn.Linear`, so that nothing that looks for linears takes it for one.

    Attributes:
        weight: [out, in], as of a linear.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        zeros = torch.zeros(shape, dtype=dtype, device=device)
        self.weight = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., in] -> [..., out]; in one layout, as sums depend on it."""
        return nn.functional.linear(x.to(self.weight.device).contiguous(), self.weight)

    def extra_repr(self) -> str:
        """Describe the shape."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class Factors(nn.Module):
    """The four factors: keys are about k_b(k_a(x)) plus the bias of `k_proj`, and values alike.

    Attributes:
        k_a, v_a: from the attention's input to what the cache keeps, [rank, h].
        k_b, v_b: from there to keys and values, [h_kv, rank].
    """

    def __init__(self, layer: KvLayer, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        shapes = layer.factor_shapes
        self.k_a = Factor(shapes["k_a"], dtype, device)
        self.k_b = Factor(shapes["k_b"], dtype, device)
        self.v_a = Factor(shapes["v_a"], dtype, device)
        self.v_b = Factor(shapes["v_b"], dtype, device)
