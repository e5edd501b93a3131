"""What a quantization stage tells about its result: rows per layer, and averages that keep labels honest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...progress import Progress
from ...recipes.stages import UniformSettings
from ...runtime.linear import tensor_shapes
from ...runtime.manifest import QuantizedModule
from ...runtime.moe_names import expert_linear
from .scheme import Choice


def unreached(rows: Sequence[Mapping[str, Any]], progress: Progress) -> dict[str, Any]:
    """Return `experts_unreached`, the experts that no token of the calibration met; empty without any.

    They were rounded to nearest, by their weights alone.

    Args:
        rows: of all linears, with their `sqnr_db`.
        progress: told about it.
    """
    names = (row["name"] for row in rows if row["quantized"] and row.get("sqnr_db", 0.0) is None)
    experts = sorted({found[:2] for name in names if (found := expert_linear(name))})
    if not experts:
        return {}
    listed = [f"{mixture}.{index}" for mixture, index in experts]
    progress.note(
        f"no token of the calibration met {len(listed)} expert{'s' if len(listed) > 1 else ''}"
        f" ({', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''}): rounded by their weights alone"
    )
    return {"experts_unreached": listed}


def scheme_bytes(scheme: QuantizedModule, dtype: torch.dtype) -> int:
    """Return the bytes that a layer of this scheme stores."""
    total = 0
    for shape, kind in tensor_shapes(scheme, dtype).values():
        count = 1
        for length in shape:
            count *= length
        total += count * kind.itemsize
    return total


def float_bytes(choice: Choice, dtype: torch.dtype) -> int:
    """Return the bytes of a layer's weight in floating point."""
    return choice.site.shape[0] * choice.site.shape[1] * dtype.itemsize


def layer_row(choice: Choice, scheme: QuantizedModule | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return one row of the report: name, role, bits, bytes, and the rule that decided.

    Args:
        choice: what was decided.
        scheme: as it came out, None for floating point.
        dtype: of the model.
    """
    row: dict[str, Any] = {
        "name": choice.site.name,
        "role": choice.site.role,
        "kernel": list(choice.site.kernel.size) if choice.site.kernel else None,
        "parameters": choice.site.shape[0] * choice.site.shape[1],
        "bits": scheme.bits if scheme else 8 * dtype.itemsize,
        "bytes": scheme_bytes(scheme, dtype) if scheme else float_bytes(choice, dtype),
        "quantized": scheme is not None,
        "decided_by": choice.decided_by,
    }
    if scheme is not None:
        row["activation_bits"] = scheme.activation.bits if scheme.activation else 16
        row["activation_scope"] = scheme.activation.scope if scheme.activation else None
        row["first_token_stored"] = scheme.first_token is not None
        row["rotation"] = scheme.rotation.block if scheme.rotation else None
        row["input_scale"] = scheme.input_scale
    return row


def label(settings: UniformSettings) -> str:
    """Return the stage's label such as W4A8; print it only beside the averages."""
    return f"W{settings.weight_bits}A{settings.activation_bits}"


def _mean_bits(rows: Sequence[Mapping[str, Any]]) -> float:
    count = sum(row["parameters"] for row in rows)
    return round(sum(row["parameters"] * row["bits"] for row in rows) / count, 4)


def averages(
    rows: Sequence[Mapping[str, Any]], stage_label: str, shared: Mapping[str, str]
) -> dict[str, Any]:
    """Return the label with what it hides: mean bits, and the layers above the labelled bits.

    Args:
        rows: of `layer_row`.
        stage_label: such as W4A8.
        shared: copied tensor -> stored tensor; a copy stores no bits, so no average counts it.

    Returns:
        label, average_bits {quantized, all_linears} weighted by parameters, and the names of the
        eight_bit_layers and float_layers.
    """
    quantized = [row for row in rows if row["quantized"]]
    stored, stored_quantized = (
        [row for row in some if f"{row['name']}.weight" not in shared] for some in (rows, quantized)
    )
    return {
        "label": stage_label,
        "average_bits": {"quantized": _mean_bits(stored_quantized), "all_linears": _mean_bits(stored)},
        "eight_bit_layers": [row["name"] for row in quantized if row["bits"] == 8],
        "float_layers": [row["name"] for row in rows if not row["quantized"]],
    }
