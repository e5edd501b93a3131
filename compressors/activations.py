"""How many bytes a forward pass keeps for the way back, counted where nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..calibration.flags import keeping_flags
from ..models.base import Family


def activation_bytes(module: nn.Module, family: Family) -> int:
    """Return the bytes that autograd keeps of one item at the family's reference input.

    Every storage counts once, the module's own tensors not at all. Attention counts as it is computed: in
    one kernel, which keeps no weight for every pair of tokens.

    Args:
        module: on the meta device, in the mode and the dtype that it will run in; stays as it is.
        family: its adapter.
    """
    inputs = family.example_inputs(module, 1, torch.Generator().manual_seed(0))
    moved = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    counted = _SavedBytes(module)
    with keeping_flags(module), torch.random.fork_rng(devices=[]), torch.enable_grad():
        module.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(counted.pack, _unpack), FusedAttention():
            output = module(**moved)
    del output  # until here its graph held what was counted
    return counted.bytes


class _SavedBytes:
    """Counts storages of tensors that autograd keeps."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._kept: list[Tensor] = []  # so that the address of a storage is not given to another
        own = chain(module.parameters(), module.buffers())
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


class FusedAttention(TorchFunctionMode):
    """Lets attention on the meta device be one kernel, as on a CPU; by itself it is taken apart there."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            call = {**dict(zip(_ARGUMENTS, args, strict=False)), **given}
            mask = call.get("attn_mask")
            plain = call["query"].ndim == 4 and not call.get("dropout_p") and not call.get("enable_gqa")
            # A bias that is learned is no mask: that kernel has no gradient for it, on a CPU either.
            if plain and (mask is None or (mask.is_floating_point() and not mask.requires_grad)):
                return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    call["query"], call["key"], call["value"], 0.0, bool(call.get("is_causal")),
                    attn_mask=mask,
                )[0]  # fmt: skip
        return func(*args, **given)


_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
