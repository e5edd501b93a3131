"""torchao's tensors in a safetensors file: stock diffusers loads it, and multiplies in int8.

What torchao 0.18 can express is one symmetric int8 grid per output channel, dynamic int8
activations per token and a channel scale of the input. So here
- grids below 8 bits lie in int8 containers: the accuracy of the bits, the size of int8;
- an asymmetric grid below 8 bits is exact as well, because (q + z) fits into int8;
- an asymmetric 8-bit grid is rounded again to a symmetric one;
- rotations, groups, low-rank branches, static activations and stored first tokens are refused: this
  layout has no place for them.
torchao's own rule for activations is absmax / 127.5, ours absmax / 127; outputs differ by that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..models.base import ModelSpec, OpenModel
from ..runtime.linear import QuantizedLinear
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.modules import name_of, quantized_layers
from .compress_format import stock_config
from .conversion import replaced
from .dequantized_format import linear_tensors
from .formats import Layout
from .refusing import refuse_inexpressible
from .writer import StoredTensor, dtype_code


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a layer has a rotation, groups, a low-rank branch, a stored first token, or activations
            of other bits or with a stored scale.
    """
    check(model.quantization)
    layers = quantized_layers(model.module)
    dtype = model.spec.dtype
    plain = {
        name: tensor
        for name, tensor in model.module.state_dict().items()
        if name.rpartition(".")[0] not in layers
    }
    plain |= {f"{name}.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    tensors = [StoredTensor.of(name, tensor) for name, tensor in plain.items()]
    for name, layer in layers.items():
        for part, (code, shape) in _parts(layer.scheme, dtype).items():
            read = partial(_part, layer, dtype, part)
            tensors.append(StoredTensor(f"{name}._weight_{part}", code, shape, read))
    config = stock_config(model)
    config["quantization_config"] = _quantization_config(model.quantization)
    load = f"diffusers.{config['_class_name']}.from_pretrained(path, torch_dtype=torch.{name_of(dtype)})"
    manifest = Manifest(history=tuple(model.history))
    metadata = _metadata(list(plain), model.quantization, dtype)
    return Layout(
        tensors, config, metadata, [load, "compress.load(path)"],
        {FILE_NAME: manifest.to_json()}, _notes(model.quantization),
    )  # fmt: skip


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    check(spec.quantization)
    plain = [
        StoredTensor(name, dtype_code(tensor.dtype), tensor.shape)
        for name, tensor in spec.tensors.items()
        if name.rpartition(".")[0] not in spec.quantization
    ]
    parts = []
    for name, scheme in spec.quantization.items():
        plain += linear_tensors(name, scheme, spec.dtype)[1:]
        for part, (code, shape) in _parts(scheme, spec.dtype).items():
            parts.append(StoredTensor(f"{name}._weight_{part}", code, shape))
    metadata = _metadata([tensor.name for tensor in plain], spec.quantization, spec.dtype)
    return plain + parts, metadata


def in_memory(model: OpenModel) -> nn.Module:
    """Return the torchao module that the exported folder must reproduce bit for bit."""
    check(model.quantization)
    return replaced(model.module, lambda name, layer: _int8_tensor(layer, model.spec.dtype))


def as_shipped(model: OpenModel) -> OpenModel:
    """Return the model that the folder holds; see `formats.as_shipped`.

    Raises:
        PlanError: as `layout`.
    """
    schemes = {name: _stored(scheme) for name, scheme in model.quantization.items()}
    return replace(model, module=in_memory(model), quantization=schemes)


def _stored(scheme: QuantizedModule) -> QuantizedModule:
    """Return the scheme of a layer in the file: always one symmetric int8 grid per output channel."""
    how = scheme.decided_by if scheme.bits == 8 else f"{scheme.decided_by}, in an int8 container"
    return scheme.model_copy(update={"bits": 8, "symmetric": True, "decided_by": how})


def check(quantization: Mapping[str, QuantizedModule]) -> None:
    """Refuse what torchao cannot express.

    Raises:
        PlanError: naming the layers and the setting to change.
    """
    reasons: dict[str, Callable[[QuantizedModule], bool]] = {
        "quantized convolutions, only linear layers; keep the convolutions": lambda s: s.kernel is not None,
        "a rotation; set rotation: none": lambda s: s.rotation is not None,
        "weight groups; set group_size: null": lambda s: s.group_size is not None,
        "a low-rank branch; set low_rank: 0": lambda s: s.low_rank > 0,
        "activations that are not 8-bit; set activation_bits: 8 or 16": lambda s: (
            s.activation is not None and s.activation.bits != 8
        ),
        "static activations; set activation_scale: token": lambda s: (
            s.activation is not None and s.activation.scope == "tensor"
        ),
        "a stored first token; set first_token: quantize": lambda s: s.first_token is not None,
    }
    if not quantization:
        raise PlanError("torchao format: no layer is quantized", hint="export with format: compress")
    refuse_inexpressible("torchao", quantization, reasons)


def _parts(scheme: QuantizedModule, dtype: torch.dtype) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows, columns = scheme.shape
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "qdata": ("I8", (rows, columns)),
        "scale": ("F32", (rows, 1)),
    }
    if scheme.input_scale:
        parts["act_pre_scale"] = (dtype_code(_pre_scale_dtype(scheme, dtype)), (columns,))
    return parts


def _pre_scale_dtype(scheme: QuantizedModule, dtype: torch.dtype) -> torch.dtype:
    # The weight-only path multiplies without a cast, so the scaled input must keep the model's dtype.
    return dtype if scheme.activation is None else torch.float32


def _grid(layer: QuantizedLinear) -> tuple[Tensor, Tensor]:
    """Return symmetric int8 values [out, in] and float32 scale [out, 1] of a layer."""
    scale = layer.scale.float()
    if layer.zero_point is None:
        return layer.levels().contiguous(), scale
    if layer.scheme.bits < 8:
        return (layer.levels().short() + layer.zero_point.short()).to(torch.int8), scale
    weight = layer.dequantized_weight()
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def _part(layer: QuantizedLinear, dtype: torch.dtype, part: str) -> Tensor:
    tensor: Tensor = getattr(_int8_tensor(layer, dtype), part)
    return tensor


def _int8_tensor(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    qdata, scale = _grid(layer)
    return _wrap(layer.scheme, dtype, qdata, scale, layer.input_scale)


def _wrap(
    scheme: QuantizedModule, dtype: torch.dtype, qdata: Tensor, scale: Tensor, input_scale: Tensor | None
) -> Tensor:
    from torchao.quantization import Int8Tensor, MappingType, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    kwargs = None
    if scheme.activation is not None:
        mapping = MappingType.SYMMETRIC if scheme.activation.symmetric else MappingType.ASYMMETRIC
        kwargs = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=mapping)
    pre_scale = None if input_scale is None else input_scale.to(_pre_scale_dtype(scheme, dtype))
    tensor: Tensor = Int8Tensor(
        qdata, scale, [1, scheme.shape[1]], dtype, act_pre_scale=pre_scale, act_quant_kwargs=kwargs
    )
    return tensor


def _metadata(
    plain: list[str], quantization: Mapping[str, QuantizedModule], dtype: torch.dtype
) -> dict[str, str]:
    """Return the header text by which torchao rebuilds its tensors, in a form that only shapes decide."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    empty: dict[str, Tensor] = {name: torch.empty(0, device="meta") for name in plain}
    for name, scheme in quantization.items():
        qdata = torch.empty(tuple(scheme.shape), dtype=torch.int8, device="meta")
        scale = torch.empty(scheme.shape[0], 1, device="meta")
        input_scale = torch.empty(scheme.shape[1], device="meta") if scheme.input_scale else None
        empty[f"{name}.weight"] = _wrap(scheme, dtype, qdata, scale, input_scale)
    _, metadata = flatten_tensor_state_dict(dict(sorted(empty.items())))
    return {"format": "pt", **metadata}


def _quantization_config(quantization: Mapping[str, QuantizedModule]) -> dict[str, Any]:
    from torchao.core.config import config_to_dict
    from torchao.quantization import (
        FqnToConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        MappingType,
    )

    kinds: dict[str, Any] = {}
    for name, scheme in quantization.items():
        kinds.setdefault(_kind(scheme), []).append(re.escape(name))
    configs = {
        "weights": Int8WeightOnlyConfig(),
        "symmetric": Int8DynamicActivationInt8WeightConfig(),
        "asymmetric": Int8DynamicActivationInt8WeightConfig(act_mapping_type=MappingType.ASYMMETRIC),
    }
    patterns = {f"re:{'|'.join(names)}": configs[kind] for kind, names in sorted(kinds.items())}
    quant_type = {"default": config_to_dict(FqnToConfig(patterns))}
    return {"quant_method": "torchao", "quant_type": quant_type, "modules_to_not_convert": None}


def _kind(scheme: QuantizedModule) -> str:
    if scheme.activation is None:
        return "weights"
    return "symmetric" if scheme.activation.symmetric else "asymmetric"


def _notes(quantization: Mapping[str, QuantizedModule]) -> tuple[str, ...]:
    low = [scheme.bits for scheme in quantization.values() if scheme.bits < 8]
    again = [name for name, scheme in quantization.items() if scheme.bits == 8 and not scheme.symmetric]
    notes = ["activations follow torchao's rule absmax / 127.5 instead of absmax / 127"]
    if low:
        notes.append(
            f"{len(low)} layers of {min(low)} to {max(low)} bits lie in int8 containers: the size of 8 bits"
        )
    if again:
        notes.append(f"{len(again)} layers with an asymmetric 8-bit grid were rounded to a symmetric one")
    return tuple(notes)
