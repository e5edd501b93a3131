"""How the package bitsandbytes says in config.json what is quantized, and what it stores. Torch-free.

All linear layers but those listed are of one type. A layer M is
- nf4 (arXiv 2305.14314): `M.weight`: uint8 [out * in / 2, 1], two places in the table of 16 values per byte,
  the first in the upper half; `M.weight.absmax`: float32, one for 64 weights in the order of memory;
  `M.weight.quant_map`: the table; `M.weight.quant_state.bitsandbytes__nf4`: JSON as bytes;
- int8 (LLM.int8, arXiv 2208.07339): `M.weight`: int8 [out, in]; `M.SCB`: float32 [out], 127 times the scale;
  `M.weight_format`: 0, rows first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SourceError
from .manifest import ActivationScheme, QuantizedModule

QUANT_METHOD = "bitsandbytes"
WRITTEN_FOR = "0.50"
BLOCK = 64
"""Weights that share a scale in nf4."""
FEWEST_ROWS = 32
"""What the outputs of an nf4 layer are a multiple of: the package's kernel for CPUs stops at others."""
THRESHOLD = 6.0
"""Inputs of a larger absolute value, LLM.int8 multiplies in half precision."""
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip
_STATE = "weight.quant_state.bitsandbytes__nf4"
_TABLE = "model.embed_tokens"
_BY_OTHERS = "compress reads what it writes in this format; transformers may load the folder all the same"


def fits_nf4(shape: tuple[int, int]) -> bool:
    """Tell whether every machine that the package runs on can compute a layer of this [out, in] in nf4."""
    return shape[0] % FEWEST_ROWS == 0 and shape[1] % BLOCK == 0


def nf4_scheme(shape: tuple[int, int], bias: bool, decided_by: str) -> QuantizedModule:
    """Return what an nf4 layer is described as: 4 bits, and a scale for 64 weights of a row."""
    return QuantizedModule(
        shape=shape, bits=4, group_size=BLOCK, symmetric=True, bias=bias, method=QUANT_METHOD,
        decided_by=decided_by,
    )  # fmt: skip


def int8_scheme(shape: tuple[int, int], bias: bool, decided_by: str) -> QuantizedModule:
    """Return what a layer of LLM.int8 is described as: 8 bits, a scale per row, inputs of 8 bits."""
    return QuantizedModule(
        shape=shape, bits=8, symmetric=True, activation=ActivationScheme(bits=8), bias=bias,
        method=QUANT_METHOD, decided_by=decided_by,
    )  # fmt: skip


def stored_parts(scheme: QuantizedModule, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the tensors of a quantized layer but its bias: name -> (safetensors dtype code, shape).

    Args:
        scheme: of `nf4_scheme` or `int8_scheme`.
        dtype: "float32", "float16" or "bfloat16": of the model.
    """
    rows, columns = scheme.shape
    if scheme.bits == 8:
        return {"weight": ("I8", (rows, columns)), "SCB": ("F32", (rows,)), "weight_format": ("U8", ())}
    return {
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("F32", (rows * columns // BLOCK,)),
        "weight.quant_map": ("F32", (len(NF4_VALUES),)),
        _STATE: ("U8", (len(_state(scheme, dtype)),)),
    }


def fixed_values(scheme: QuantizedModule, dtype: str) -> dict[str, bytes]:
    """Return the tensors of a layer that say what the config says, too: name -> content."""
    if scheme.bits == 8:
        return {"weight_format": b"\0"}
    table = struct.pack(f"<{len(NF4_VALUES)}f", *NF4_VALUES)
    return {"weight.quant_map": table, _STATE: _state(scheme, dtype)}


def _state(scheme: QuantizedModule, dtype: str) -> bytes:
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": list(scheme.shape)}
    return json.dumps(state).encode()


def section_of(bits: int, dtype: str, floats: Iterable[str]) -> dict[str, Any]:
    """Return config.json's `quantization_config`, in the library's words.

    Args:
        bits: 4 for nf4, 8 for LLM.int8.
        dtype: of the model, in which nf4 layers compute.
        floats: linear layers that stay in floating point.
    """
    four = bits == 4
    return {
        "quant_method": QUANT_METHOD,
        "load_in_4bit": four, "_load_in_4bit": four, "load_in_8bit": not four, "_load_in_8bit": not four,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": THRESHOLD, "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_skip_modules": sorted(floats),
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
        Layer -> scheme, in the model's order.

    Raises:
        SourceError: it says anything that we do not write, or names a layer that the model does not have.
    """
    try:
        bits, dtype = 4 if section["load_in_4bit"] else 8, str(section["bnb_4bit_compute_dtype"])
        floats = list(section["llm_int8_skip_modules"])
        same = section_of(bits, dtype, floats) == dict(section)
    except (KeyError, TypeError) as error:
        raise SourceError(f"{where}: quantization_config cannot be read: {error}", hint=_BY_OTHERS) from None
    linears = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and not name.startswith(_TABLE)
    }
    if not same or not linears.keys() > set(floats):
        raise SourceError(
            f"{where}: quantization_config is not one that compress writes for {QUANT_METHOD}",
            hint=_BY_OTHERS,
        )
    found = {}
    for name, shape in linears.items():
        if name not in floats:
            rows, columns = shape
            make = nf4_scheme if bits == 4 else int8_scheme
            if bits == 4 and not fits_nf4((rows, columns)):
                raise SourceError(f"{where}: layer {name} has no size that nf4 layers have", hint=_BY_OTHERS)
            found[name] = make((rows, columns), f"{name}.bias" in shapes, "as stored")
    return found
