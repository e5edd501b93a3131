"""What the linear layers of a checkpoint are stored in, summed up for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..recipes.stages import STAGES
from ..runtime.moe_names import expert_linear

Row = Mapping[str, Any]
"""One row of `evaluation.size.linear_inventory`."""


def _stored(linears: Sequence[Row]) -> list[Row]:
    """Leave out the copies, which are stored, and counted as parameters, under another name."""
    return [row for row in linears if row.get("copy_of") is None]


def allocation_of(document: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a stage that chose bits layer by layer tells about it; None where there was none."""
    for stage in document.get("stages", ()):
        found = stage.get("details", {}).get("allocation")
        if found:
            return dict(found)
    return None


def label_of(linears: Sequence[Row]) -> str | None:
    """Return the short name of the scheme that most quantized parameters have, such as ``W4A8``.

    Returns:
        None where nothing is quantized. The name alone says little: print it with `average_bits`.
    """
    weights: Counter[str] = Counter()
    for row in _stored(linears):
        if row["method"] is not None:
            weights[f"W{row['weight_bits']}A{row['activation_bits'] or 16}"] += row["parameters"]
    return weights.most_common(1)[0][0] if weights else None


def mixed_label_of(document: Mapping[str, Any]) -> str | None:
    """Return the short name of a model with bits of its own per layer, by their mean, such as ``W3.51A8``.

    The mean is that of the layers with a choice; print with the name that it is one. Weight-only layers
    have no say in the activation bits.

    Returns:
        None where no stage chose bits, or nothing is quantized.
    """
    found = allocation_of(document)
    linears = document["evaluation"].get("linears", ())
    if found is None or label_of(linears) is None:
        return None
    mean = f"{found['used']['mean_bits']:.2f}"
    inputs = sorted({row["activation_bits"] for row in linears if row["method"] and row["activation_bits"]})
    shown = "/".join(str(bits) for bits in inputs) or "16"
    return f"W{mean.removesuffix('0')}A{shown}"


def has_quantizer(document: Mapping[str, Any]) -> bool:
    """Tell whether a stage rounded weights, also where they are stored as floats again."""
    methods = [stage["method"] for stage in document.get("stages", ())]
    return any(method in STAGES and STAGES[method].phase == "quantize" for method in methods)


def average_bits(linears: Sequence[Row]) -> float:
    """Return the bits per weight of the linears, weighted by parameters, scales not counted.

    A layer that is stored as a copy of another counts once, as it does in the parameters.
    """
    rows = _stored(linears)
    total = sum(row["parameters"] for row in rows)
    return float(sum(row["parameters"] * row["weight_bits"] for row in rows) / total)


def pattern_of(name: str) -> str:
    """Return a module's name with its first number, that of its block, as a wildcard; an expert's as well."""
    expert = expert_linear(name)
    if expert is not None:
        name = f"{expert[0]}.*.{expert[2]}"
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name, count=1)


def exceptions(linears: Sequence[Row], label: str) -> list[str]:
    """Return Markdown list items that name the layers whose weights the label does not describe."""
    bits = int(label[1:].split("A")[0])
    others: dict[str, list[str]] = {}
    for row in linears:
        floating = row["method"] is None
        if floating or row["weight_bits"] != bits:
            kind = f"{row['weight_bits']}-bit " + ("floating point" if floating else "weights")
            others.setdefault(kind, []).append(f"`{pattern_of(row['name'])}`")
    if not others:
        return [f"Every linear layer has {bits}-bit weights."]
    return [f"- {kind}: {', '.join(dict.fromkeys(names))}" for kind, names in others.items()]


def grouped(linears: Sequence[Row]) -> list[tuple[str, str, str, str, int, int, str]]:
    """Group layers that are stored alike, in forward order.

    Returns:
        (name pattern, weight bits, activation bits, scale per, layers, bytes, decided by).
    """
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in linears:
        key = (pattern_of(row["name"]), _weight(row), _activation(row), _scale(row), row["decided_by"])
        groups.setdefault(key, []).append(row)
    return [
        (pattern, weight, activation, scale, len(rows), sum(row["bytes"] for row in rows), decided_by)
        for (pattern, weight, activation, scale, decided_by), rows in groups.items()
    ]


def _weight(row: Row) -> str:
    height, width = row.get("kernel") or (None, None)
    window = f", {height} x {width} convolution" if height else ""
    if row["method"] is None:
        return f"{row['weight_bits']} (floating point){window}"
    branch = f" + a rank-{row['low_rank']} branch" if row["low_rank"] else ""
    return f"{row['weight_bits']}{branch}{window}"


def _activation(row: Row) -> str:
    words = [str(row["activation_bits"] or "floating point")]
    words += ["static"] if row.get("activation_scope") == "tensor" else []
    words += ["first token stored"] if row.get("first_token_stored") else []
    return ", ".join(words)


def _scale(row: Row) -> str:
    if row["method"] is None:
        return ""
    return f"{row['group_size']} inputs" if row["group_size"] else "output channel"
