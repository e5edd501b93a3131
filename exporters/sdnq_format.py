"""The layout of the package sdnq: packed weights that stock diffusers loads where sdnq is installed.

Written from the layout alone; sdnq (GPL-3.0) is neither imported nor needed to write. A layer M is
- `M.weight`: 8 bits: int8 or uint8 [out, in], transposed where an integer product will use it;
  below 8 bits: value + offset, packed over the whole tensor, see `pack_flat`;
- `M.scale`: float32 [out, 1], or [out, groups, 1], transposed like the weight;
- `M.zero_point`: float32 like the scale, only for unsigned types: W^ = weight * scale + zero_point.
sdnq has no place for an input scale, its rotations are other ones than ours, and its low-rank
branch lies elsewhere: layers with these are refused. Its rule for activations is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, VerifyError
from ..models.base import ModelSpec, OpenModel
from ..runtime.linear import QuantizedLinear
from ..runtime.load import read_tensor
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.modules import name_of, quantized_layers
from ..runtime.validate import open_folder
from .bits_file import bits_files
from .compress_format import METADATA, stock_config
from .dequantized_format import linear_tensors
from .formats import Layout
from .writer import StoredTensor, dtype_code

SDNQ_VERSION = "0.2.8"
Parts = dict[str, tuple[str, tuple[int, ...]]]


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a layer has an input scale, a rotation, a low-rank branch or other activations.
    """
    check(model.quantization)
    layers = quantized_layers(model.module)
    tensors, others = [], []
    for name, tensor in model.module.state_dict().items():
        owner, _, suffix = name.rpartition(".")
        if owner in layers:
            continue
        tensors.append(StoredTensor.of(name, tensor))
        if suffix == "weight":
            others.append(name)
    for name, layer in layers.items():
        if layer.bias is not None:
            tensors.append(StoredTensor.of(f"{name}.bias", layer.bias))
        for part, (code, shape) in _parts(layer.scheme).items():
            tensors.append(StoredTensor(f"{name}.{part}", code, shape, partial(_encode, layer, part)))
    config = stock_config(model)
    config["quantization_config"] = _quantization_config(model.quantization, others)
    dtype = name_of(model.spec.dtype)
    load = f"diffusers.{config['_class_name']}.from_pretrained(path, torch_dtype=torch.{dtype})"
    manifest = Manifest(history=tuple(model.history))
    notes = (
        f"loading needs the package sdnq (GPL-3.0), written for its layout of version {SDNQ_VERSION}",
        "the package quantizes activations by its own rule, and not at all below 32 tokens",
    )
    extra = {FILE_NAME: manifest.to_json(), **bits_files(model)}
    return Layout(tensors, config, METADATA, [load], extra, notes)


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    check(spec.quantization)
    tensors = [
        StoredTensor(name, dtype_code(tensor.dtype), tensor.shape)
        for name, tensor in spec.tensors.items()
        if name.rpartition(".")[0] not in spec.quantization
    ]
    for name, scheme in spec.quantization.items():
        tensors += linear_tensors(name, scheme, spec.dtype)[1:]
        tensors += [
            StoredTensor(f"{name}.{part}", code, shape) for part, (code, shape) in _parts(scheme).items()
        ]
    return tensors, METADATA


def check(quantization: Mapping[str, QuantizedModule]) -> None:
    """Refuse what sdnq cannot express.

    Raises:
        PlanError: naming the layers.
    """
    reasons: dict[str, Callable[[QuantizedModule], bool]] = {
        "quantized convolutions, whose layout there is not known here": lambda s: s.kernel is not None,
        "a channel scale of the input": lambda s: s.input_scale,
        "a rotation": lambda s: s.rotation is not None,
        "a low-rank branch": lambda s: s.low_rank > 0,
        "activations that are not 8-bit symmetric": lambda s: (
            s.activation is not None and (s.activation.bits != 8 or not s.activation.symmetric)
        ),
        "static activations": lambda s: s.activation is not None and s.activation.scope == "tensor",
        "a stored first token": lambda s: s.first_token is not None,
        "a number of weights that is no multiple of 8": lambda s: s.shape[0] * s.shape[1] % 8 != 0,
    }
    if not quantization:
        raise PlanError("sdnq format: no layer is quantized", hint="export with format: compress")
    for what, holds in reasons.items():
        names = [name for name, scheme in quantization.items() if holds(scheme)]
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise PlanError(
                f"sdnq format cannot express {what} ({listed})",
                hint="export with format: compress, or quantize linear layers alone with rtn and a scale per"
                " token, which uses none of these",
            )


def _groups(scheme: QuantizedModule) -> int:
    return scheme.shape[1] // scheme.group_size if scheme.group_size else 1


def _integer_product(scheme: QuantizedModule) -> bool:
    """Tell whether sdnq multiplies in integers: its own condition on the size of a layer."""
    rows, columns = scheme.shape
    fits = min(rows, columns) >= 32 and rows % 16 == 0 and columns % 16 == 0
    return scheme.activation is not None and fits


def _transposed(scheme: QuantizedModule) -> bool:
    return scheme.bits == 8 and _groups(scheme) == 1 and _integer_product(scheme)


def _parts(scheme: QuantizedModule) -> Parts:
    (rows, columns), groups = scheme.shape, _groups(scheme)
    weight: tuple[int, ...] = (rows, columns) if groups == 1 else (rows, groups, columns // groups)
    grid: tuple[int, ...] = (rows, 1) if groups == 1 else (rows, groups, 1)
    if _transposed(scheme):
        weight, grid = (columns, rows), (1, rows)
    if scheme.bits < 8:
        weight = _packed_shape(rows * columns, scheme.bits)
    parts: Parts = {
        "weight": ("I8" if scheme.bits == 8 and scheme.symmetric else "U8", weight),
        "scale": ("F32", grid),
    }
    if not scheme.symmetric:
        parts["zero_point"] = ("F32", grid)
    return parts


def _packed_shape(count: int, bits: int) -> tuple[int, ...]:
    return {2: (count // 4,), 3: (count // 8, 3), 4: (count // 2,), 6: (count // 4, 3)}[bits]


def _encode(layer: QuantizedLinear, part: str) -> Tensor:
    _, shape = _parts(layer.scheme)[part]
    half = 1 << (layer.scheme.bits - 1)
    if part == "weight":
        levels = layer.levels()
        if layer.scheme.bits < 8:
            return pack_flat(levels.to(torch.int16) + half, layer.scheme.bits)
        if not layer.scheme.symmetric:
            levels = (levels.to(torch.int16) + half).to(torch.uint8)
        return (levels.t() if _transposed(layer.scheme) else levels).reshape(shape)
    scale = layer.scale.float()
    if part == "scale":
        return scale.reshape(shape)
    assert layer.zero_point is not None, "only asymmetric layers store this part"
    return ((layer.zero_point.float() - half) * scale).reshape(shape)


def pack_flat(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned values [any shape] of 2, 3, 4 or 6 bits; neighbours in memory share bytes.

    2 and 4 bits: the first value in the lowest bits. 3 bits: eight values in three bytes, byte j
    holds values j and 3 + j, its two top bits hold parts of the last two. 6 bits: four values in
    three bytes, byte j holds value j, its two top bits hold two bits of the last, highest first.
    """
    flat = values.to(torch.int16).reshape(-1)
    if bits in (2, 4):
        columns = flat.view(-1, 8 // bits)
        shifted = columns << torch.arange(0, 8, bits, dtype=torch.int16)
        return shifted.sum(dim=-1).to(torch.uint8)
    if bits == 3:
        v = flat.view(-1, 8)
        tops = [v[:, 6] & 3, v[:, 7] & 3, (v[:, 6] >> 2) | ((v[:, 7] >> 2) << 1)]
        parts = [v[:, j] | (v[:, 3 + j] << 3) | (tops[j] << 6) for j in range(3)]
    else:
        v = flat.view(-1, 4)
        parts = [v[:, j] | (((v[:, 3] >> (4 - 2 * j)) & 3) << 6) for j in range(3)]
    return torch.stack(parts, dim=-1).to(torch.uint8)


def unpack_flat(packed: Tensor, bits: int) -> Tensor:
    """Undo `pack_flat`: int16 [values]."""
    p = packed.to(torch.int16)
    if bits in (2, 4):
        mask = (1 << bits) - 1
        return torch.stack([(p >> (bits * i)) & mask for i in range(8 // bits)], dim=-1).reshape(-1)
    top = p >> 6
    if bits == 3:
        last = [top[:, 0] | ((top[:, 2] & 1) << 2), top[:, 1] | ((top[:, 2] >> 1) << 2)]
        parts = [*(p & 7).unbind(-1), *((p >> 3) & 7).unbind(-1), *last]
    else:
        parts = [*(p & 63).unbind(-1), (top[:, 0] << 4) | (top[:, 1] << 2) | top[:, 2]]
    return torch.stack(parts, dim=-1).reshape(-1)


def check_written(model: OpenModel, folder: Path) -> None:
    """Read a folder back and compare every quantized layer's integers and grid with the model's.

    Raises:
        VerifyError: naming the first layer that differs.
    """
    stored = open_folder(folder)
    for name, layer in quantized_layers(model.module).items():
        tensors = {part: read_tensor(stored.tensors[f"{name}.{part}"]) for part in _parts(layer.scheme)}
        levels = _levels(tensors["weight"], layer.scheme)
        grids = [part for part in tensors if part != "weight"]
        same = all(torch.equal(tensors[part], _encode(layer, part).cpu()) for part in grids)
        if not same or not torch.equal(levels, layer.levels().cpu()):
            raise VerifyError(
                f"{folder}: layer {name} does not decode to the integers of the model in memory"
            )


def _levels(weight: Tensor, scheme: QuantizedModule) -> Tensor:
    """Return the signed integers int8 [out, in] of a stored weight."""
    rows, columns = scheme.shape
    half = 1 << (scheme.bits - 1)
    if scheme.bits < 8:
        return (unpack_flat(weight, scheme.bits) - half).to(torch.int8).view(rows, columns)
    value = weight.t() if _transposed(scheme) else weight.reshape(rows, columns)
    return value if scheme.symmetric else (value.to(torch.int16) - half).to(torch.int8)


def _quantization_config(quantization: Mapping[str, QuantizedModule], others: list[str]) -> dict[str, Any]:
    kinds: dict[str, list[str]] = {}
    for name, scheme in quantization.items():
        kinds.setdefault(f"{'int' if scheme.symmetric else 'uint'}{scheme.bits}", []).append(f"{name}.weight")
    return {
        "quant_method": "sdnq",
        "sdnq_version": SDNQ_VERSION,
        "weights_dtype": max(kinds, key=lambda kind: len(kinds[kind])),
        "group_size": -1,
        "dequantize_fp32": True,
        "use_quantized_matmul": any(_integer_product(scheme) for scheme in quantization.values()),
        "add_skip_keys": False,
        "modules_dtype_dict": kinds,
        "modules_quant_config": {
            f"{name}.weight": {"group_size": scheme.group_size}
            for name, scheme in quantization.items()
            if _groups(scheme) > 1
        },
        "modules_to_not_convert": sorted(others),
        "modules_to_not_use_matmul": [
            f"{name}.weight" for name, scheme in quantization.items() if not _integer_product(scheme)
        ],
    }
