"""How the package compressed-tensors says in config.json what is quantized, and what it stores. Torch-free.

A layer M is
- `M.weight_packed`: int32 [out, ceil(in * bits / 32)], value + 2^(bits-1), low bits first, no padding between
  values, and `M.weight_shape`: int64 [2]; with 8-bit weights and quantized activations instead
  `M.weight`: int8 [out, in];
- `M.weight_scale`: [out, 1] or [out, groups] in the model's dtype, because the package multiplies in the
  dtype of the scale: W^ = q * scale.
Every set of equal layers is a group of `config_groups`, with the names of its layers and a format of its own,
so bits may differ from layer to layer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import SourceError
from .headers import DTYPE_CODES
from .manifest import ActivationScheme, QuantizedModule

QUANT_METHOD = "compressed-tensors"
WRITTEN_FOR = "0.20"
_PACKED, _INTEGERS, _MIXED = "pack-quantized", "int-quantized", "mixed-precision"
_BY_OTHERS = "compress reads what it writes in this format; transformers may load the folder all the same"


def format_of(scheme: QuantizedModule) -> str:
    """Return the package's name for how a layer is stored: integer products know 8 bits unpacked alone."""
    return _INTEGERS if scheme.bits == 8 and scheme.activation is not None else _PACKED


def stored_parts(scheme: QuantizedModule, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of a quantized layer but its bias: name -> (safetensors dtype code, shape).

    Args:
        scheme: of the layer.
        dtype: "float32", "float16" or "bfloat16": of the model.
    """
    rows, columns = scheme.shape
    groups = columns // scheme.group_size if scheme.group_size else 1
    scale = {"weight_scale": (DTYPE_CODES[dtype], (rows, groups))}
    if format_of(scheme) == _INTEGERS:
        return {"weight": ("I8", (rows, columns)), **scale}
    words = -(-columns * scheme.bits // 32)
    return {"weight_packed": ("I32", (rows, words)), "weight_shape": ("I64", (2,)), **scale}


def fixed_values(scheme: QuantizedModule, dtype: str) -> dict[str, bytes]:
    """Return the tensors of a layer that say what the config says, too: name -> content."""
    return {} if format_of(scheme) == _INTEGERS else {"weight_shape": struct.pack("<2q", *scheme.shape)}


def section_of(quantization: Mapping[str, QuantizedModule], floats: Iterable[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`, in the package's words.

    Args:
        quantization: layer -> scheme.
        floats: linear layers that stay in floating point.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, scheme in quantization.items():
        grid = scheme.activation and (scheme.activation.bits, scheme.activation.symmetric)
        key = (scheme.bits, scheme.group_size, grid)
        groups.setdefault(key, {**_group(scheme), "targets": []})["targets"].append(name)
    formats = sorted({group["format"] for group in groups.values()})
    return {
        "quant_method": QUANT_METHOD,
        "format": formats[0] if len(formats) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": sorted(floats),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: QuantizedModule) -> dict[str, Any]:
    inputs = None
    if scheme.activation is not None:
        inputs = {
            "num_bits": scheme.activation.bits, "type": "int", "symmetric": scheme.activation.symmetric,
            "strategy": "token", "dynamic": True,
        }  # fmt: skip
    return {
        "weights": {
            "num_bits": scheme.bits, "type": "int", "symmetric": True, "dynamic": False,
            "strategy": "group" if scheme.group_size else "channel", "group_size": scheme.group_size,
        },
        "input_activations": inputs,
        "output_activations": None,
        "format": format_of(scheme),
    }  # fmt: skip


def schemes_of(
    section: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, QuantizedModule]:
    """Read a section that `section_of` wrote.

    Args:
        section: of config.json; it is untrusted.
        shapes: of the dense model's tensors.
        where: for the message.

    Returns:
        Layer -> scheme, in the order of the section.

    Raises:
        SourceError: it says anything that we do not write, or names a layer that the model does not have.
    """
    try:
        found = dict(_schemes(section, shapes))
        same = section_of(found, section["ignore"]) == dict(section)
    except (AttributeError, KeyError, TypeError, ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"{where}: quantization_config cannot be read: {reason}", hint=_BY_OTHERS) from None
    if not same:
        raise SourceError(
            f"{where}: quantization_config is not one that compress writes for {QUANT_METHOD}",
            hint=_BY_OTHERS,
        )
    return found


def _schemes(
    section: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterable[tuple[str, QuantizedModule]]:
    for group in section["config_groups"].values():
        weights, inputs = group["weights"], group["input_activations"]
        activation = inputs and ActivationScheme(bits=inputs["num_bits"], symmetric=inputs["symmetric"])
        for name in group["targets"]:
            shape = shapes.get(f"{name}.weight", ())
            if len(shape) != 2:
                raise ValueError(f"{name!r} is no linear layer of the model")
            scheme = QuantizedModule(
                shape=shape, bits=weights["num_bits"], group_size=weights["group_size"], symmetric=True,
                activation=activation, bias=f"{name}.bias" in shapes, method=QUANT_METHOD,
                decided_by="as stored",
            )  # fmt: skip
            yield name, scheme
