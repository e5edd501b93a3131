"""Layers of the package bitsandbytes around tensors that are rounded already, to be run in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from ..runtime.bitsandbytes_section import THRESHOLD


class Nf4Linear(bitsandbytes.nn.Linear4bit):
    """The package's layer; its state dict has the tensors of the file.

    The package's own would be of what it made of them: on a CPU with AVX512-BF16 it packs weights anew, and
    rounds scales to bfloat16, before the first product.

    Args:
        stored: the tensors of the layer in a file, by their names in it.
        bias: [out] or None.
        dtype: in which it computes.
    """

    def __init__(
        self, shape: tuple[int, int], stored: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                shape[1], shape[0], bias is not None, compute_dtype=dtype, compress_statistics=False,
                quant_type="nf4",
            )  # fmt: skip
        self.stored = dict(stored)
        self.weight = bitsandbytes.nn.Params4bit.from_prequantized(
            data=stored["weight"],
            quantized_stats={name: tensor for name, tensor in stored.items() if name != "weight"},
            device=stored["weight"].device,
            module=self,
        )
        _put_bias(self, bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination.update({f"{prefix}{name}": tensor for name, tensor in self.stored.items()})
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()


def int8_linear(shape: tuple[int, int], stored: Mapping[str, Tensor], bias: Tensor | None) -> nn.Linear:
    """Return the package's layer of LLM.int8.

    Args:
        shape: (out, in).
        stored: `weight` int8 [out, in] and `SCB` float32 [out].
        bias: [out] or None.
    """
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear8bitLt(
            shape[1], shape[0], bias is not None, has_fp16_weights=False, threshold=THRESHOLD
        )
    weight = bitsandbytes.nn.Int8Params(stored["weight"], requires_grad=False, SCB=stored["SCB"])
    layer.weight = weight.to(stored["weight"].device)
    _put_bias(layer, bias)
    found: nn.Linear = layer
    return found


def _put_bias(layer: nn.Linear, bias: Tensor | None) -> None:
    if bias is not None:
        # Of its own: the package casts it in place where inputs have another dtype.
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
