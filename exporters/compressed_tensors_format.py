"""The layout of the package compressed-tensors: transformers loads it where that package is installed.

Written from the layout alone (`runtime.compressed_tensors_section`) and for version 0.20 of the package,
which tests hold it against. The package packs zero points, but cannot load them again; it writes rotations,
but transformers ignores them: layers with these are refused, and all else that has no place in the layout.
What is computed is told in `token_rounding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import PlanError
from ..models.base import ModelSpec, OpenModel
from ..runtime.compressed_tensors_section import QUANT_METHOD, WRITTEN_FOR, section_of, stored_parts
from ..runtime.linear import QuantizedLinear
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.modules import name_of, quantized_layers
from .bits_file import bits_files
from .compress_format import METADATA, cache_notes, check_cache, stock_config
from .conversion import swapped
from .dequantized_format import linear_tensors, unquantized
from .formats import Layout
from .refusing import KEEP, Reasons, refuse_inexpressible
from .stock import left_out, stock_way
from .token_rounding import UnpackedLinear
from .writer import StoredTensor


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a layer has what the layout has no place for; see `check`.
    """
    check(model.quantization)
    check_cache(model)
    class_name, dtype = str(model.config["_class_name"]), model.spec.dtype
    layers, gone = quantized_layers(model.module), left_out(model.config)
    tensors = [
        StoredTensor.of(name, tensor)
        for name, tensor in model.module.state_dict().items()
        if name.rpartition(".")[0] not in layers and name not in gone
    ]
    for name, layer in layers.items():
        if layer.bias is not None:
            tensors.append(StoredTensor.of(f"{name}.bias", layer.bias))
        for part, (code, shape) in _parts(layer.scheme, dtype).items():
            read = partial(_encode, layer, dtype, part)
            tensors.append(StoredTensor(f"{name}.{part}", code, shape, read))
    config = stock_config(model)
    floats = [site.name for site in model.linears() if site.name not in layers]
    config["quantization_config"] = section_of(model.quantization, floats)
    manifest = Manifest(kv_cache=model.kv_cache, history=tuple(model.history))
    extra = {FILE_NAME: manifest.to_json(), **bits_files(model)}
    ways = [stock_way(class_name, name_of(dtype)), "compress.load(path)"]
    notes = _notes(model.quantization, dtype) + cache_notes(model, ways)
    return Layout(tensors, config, METADATA, ways, extra, notes)


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    check(spec.quantization)
    tensors = unquantized(spec)
    for name, scheme in spec.quantization.items():
        tensors += linear_tensors(name, scheme, spec.dtype)[1:]
        tensors += [
            StoredTensor(f"{name}.{part}", code, shape)
            for part, (code, shape) in _parts(scheme, spec.dtype).items()
        ]
    return tensors, METADATA


def in_memory(model: OpenModel) -> nn.Module:
    """Return the module that the exported folder must reproduce bit for bit."""
    check(model.quantization)
    return swapped(
        model.module,
        {name: _computed(layer, model.spec.dtype) for name, layer in quantized_layers(model.module).items()},
    )


def as_shipped(model: OpenModel) -> OpenModel:
    """Return the model that the folder holds; see `formats.as_shipped`.

    Raises:
        PlanError: as `layout`.
    """
    return replace(model, module=in_memory(model))


def check(quantization: Mapping[str, QuantizedModule]) -> None:
    """Refuse what the layout, or what reads it, cannot express.

    Raises:
        PlanError: naming the layers and the setting to change.
    """
    if not quantization:
        raise PlanError(
            "compressed-tensors format: no layer is quantized", hint="export with format: compress"
        )
    refuse_inexpressible("compressed-tensors", quantization, _REASONS)


_REASONS: Reasons = {
    "quantized convolutions; keep the convolutions": lambda s: s.kernel is not None,
    "asymmetric weights; set weight_symmetric: true": lambda s: not s.symmetric,
    "a rotation; set rotation: none": lambda s: s.rotation is not None,
    "a low-rank branch; set low_rank: 0": lambda s: s.low_rank > 0,
    "static activations; set activation_scale: token": lambda s: (
        s.activation is not None and s.activation.scope == "tensor"
    ),
    "a stored first token; set first_token: quantize": lambda s: s.first_token is not None,
    f"channel scales of inputs that no layer before them absorbs; set {KEEP}, or use rtn or mixdq": (
        lambda s: s.input_scale
    ),
}


def _parts(scheme: QuantizedModule, dtype: torch.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
    return stored_parts(scheme, name_of(dtype))


def _encode(layer: QuantizedLinear, dtype: torch.dtype, part: str) -> Tensor:
    if part == "weight_scale":
        return layer.scale.to(dtype)
    if part == "weight_shape":
        return torch.tensor(layer.scheme.shape)
    if part == "weight":
        return layer.levels()
    return packed_words(layer)


def packed_words(layer: QuantizedLinear) -> Tensor:
    """Return the integers of a layer as the package packs them: int32 [out, ceil(in * bits / 32)]."""
    # Our own bit stream is the same one; it ends with the last byte of a row, theirs with the last word.
    bytes_ = layer.qweight if layer.scheme.bits < 8 else (layer.levels().short() + 128).to(torch.uint8)
    return F.pad(bytes_, (0, -bytes_.shape[1] % 4)).view(torch.int32)


def _computed(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the layer as the package computes it."""
    rows, columns = layer.scheme.shape
    level = layer.levels().to(dtype).view(rows, layer.scale.shape[1], -1)
    weight = (level * layer.scale.to(dtype).unsqueeze(-1)).view(rows, columns)
    stored = {part: _encode(layer, dtype, part) for part in _parts(layer.scheme, dtype)}
    if layer.bias is not None:
        stored["bias"] = layer.bias
    return UnpackedLinear(weight, layer.scheme.activation, stored)


def _notes(quantization: Mapping[str, QuantizedModule], dtype: torch.dtype) -> tuple[str, ...]:
    notes = [
        f"written in the layout of {QUANT_METHOD} {WRITTEN_FOR}",
        "transformers unpacks the weights into floating point before the first forward: the file is small,"
        " the memory is that of a floating-point model",
    ]
    if any(scheme.activation is not None for scheme in quantization.values()):
        notes.append(
            "activations follow the package's rule absmax / (2^bits - 1) * 2, and are rounded as floats:"
            " transformers multiplies no integers"
        )
    if dtype != torch.float32:
        notes.append(f"scales are stored in {name_of(dtype)}, in which the package multiplies")
    return tuple(notes)
