"""How much smaller a model became; bytes as stored, shared copies once, scales counted."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models.base import OpenModel, Size, tensor_bytes

_BFLOAT16_BYTES = 2


def linear_bytes(model: OpenModel) -> tuple[int, int]:
    """Return (bytes, bytes in bfloat16) of the quantized layers of the blocks: linears and convolutions.

    The linears of the adaptive norms are left out: they have bits of their own, `adaln_weight_bits`,
    and stand in `linear_inventory`. The first number counts every tensor of a layer: packed weights,
    scales, zero points, signs, low-rank branches and the bias. The second counts the weight and the
    bias that the layer had.
    """
    stored = dense = 0
    for site in model.linears():
        scheme = model.quantization.get(site.name)
        if scheme is None or site.block is None or site.role in ("adaln", "embedder"):
            continue
        tensors = model.module.get_submodule(site.name).state_dict().values()
        stored += sum(tensor_bytes(tensor) for tensor in tensors)
        rows, columns = scheme.shape
        dense += _BFLOAT16_BYTES * (rows * columns + (rows if scheme.bias else 0))
    return stored, dense


def linear_inventory(model: OpenModel) -> list[dict[str, Any]]:
    """Return one row per linear and convolution, in forward order: what it is stored in, who decided so.

    ``kernel`` is [height, width] of a convolution's window, None for a linear.

    ``bytes`` counts every tensor of the layer once: 0 for a copy that is stored under another name.
    ``weight_bits`` of a layer in floating point are those of its type; ``activation_bits`` likewise
    where activations are not quantized. ``activation_scope`` says what shares a scale of theirs, and
    ``first_token_stored`` whether the output for the text's first token is stored in floating point.
    ``copy_of`` names the linear whose weight this one shares, None for all others: averages over what is
    stored leave copies out.
    """
    shared, dense = model.shared, model.dense().split().tensors
    rows = []
    for site in model.linears():
        module = model.module.get_submodule(site.name)
        scheme = model.quantization.get(site.name)
        bits = scheme.bits if scheme else _float_bits(module)
        activation = scheme.activation if scheme else None
        stored = sum(
            tensor_bytes(tensor)
            for name, tensor in module.state_dict().items()
            if f"{site.name}.{name}" not in shared
        )
        original = sum(
            spec.bytes
            for name in ("weight", "bias")
            if (spec := dense.get(f"{site.name}.{name}")) and f"{site.name}.{name}" not in shared
        )
        first = shared.get(f"{site.name}.weight")
        rows.append(
            {
                "name": site.name,
                "copy_of": first.removesuffix(".weight") if first else None,
                "role": site.role,
                "block": site.block,
                "kernel": list(site.kernel.size) if site.kernel else None,
                "parameters": site.shape[0] * site.shape[1],
                "weight_bits": bits,
                "activation_bits": activation.bits if activation else None,
                "activation_scope": activation.scope if activation else None,
                "first_token_stored": scheme is not None and scheme.first_token is not None,
                "group_size": scheme.group_size if scheme else None,
                "low_rank": scheme.low_rank if scheme else 0,
                "bytes": stored,
                "bytes_original": original,
                "method": scheme.method if scheme else None,
                "decided_by": scheme.decided_by if scheme else "left in floating point",
            }
        )
    return rows


def _float_bits(module: nn.Module) -> int:
    return 8 * next(module.parameters()).element_size()


def counted_sizes(size: Size, original: Size, stored_bytes: int) -> dict[str, int | float]:
    """Return the metrics that follow from shapes and stored bytes alone, of a plan as of a model.

    Args:
        size: of the model after its stages.
        original: of the model before them.
        stored_bytes: tensor bytes of the exported files, copies once.
    """
    cache, before = size.kv_bytes_per_token, original.kv_bytes_per_token
    of_cache = {} if cache is None else {"kv_bytes_per_token": cache}
    of_cache |= {"kv_bytes_ratio": cache / before} if cache is not None and before else {}
    return {
        "size_ratio": stored_bytes / original.bytes,
        "bytes": stored_bytes,
        "bits_per_weight": 8 * stored_bytes / size.parameters,
        "parameters": size.parameters,
        "macs": size.macs,
        **of_cache,
    }


def size_metrics(model: OpenModel, stored_bytes: int | None = None) -> dict[str, float]:
    """Return the size metrics of a model after its stages.

    Args:
        model: its `spec` describes the original as it is stored.
        stored_bytes: tensor bytes of the exported files, copies once; None: those of the module as it is now,
            which formats that unpack or round back to floating point do not keep.

    Returns:
        ``size_ratio`` (fraction 0-1 of the original's bytes), ``bytes``, ``bits_per_weight``,
        ``parameters``, ``macs``; and ``linear_bytes_ratio`` where a block's linear is quantized.
    """
    size, original = model.size(), model.spec.size()
    stored_bytes = size.bytes if stored_bytes is None else stored_bytes
    metrics: dict[str, float] = {**counted_sizes(size, original, stored_bytes)}
    linears, dense = linear_bytes(model)
    if dense:
        metrics["linear_bytes_ratio"] = linears / dense
    return metrics
