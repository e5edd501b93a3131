"""The fallback that every tool reads: the quantized weights as floats, in the stock layout.

Nothing is saved on disk and activations are not quantized; rotations, channel scales and low-rank
branches are multiplied into the weight. The dtype is the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..models.base import ModelSpec, OpenModel
from ..runtime.linear import QuantizedLinear
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.modules import name_of, quantized_layers
from .compress_format import METADATA, cache_notes, check_cache, stock_config
from .conversion import replaced
from .form import stored_form
from .formats import Layout
from .stock import left_out, one_by_one, stock_way
from .writer import StoredTensor, dtype_code


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a layer stores its output for the first token.
    """
    check(model.quantization)
    check_cache(model)
    dtype = model.spec.dtype
    layers = quantized_layers(model.module)
    tensors = [
        StoredTensor.of(name, tensor)
        for name, tensor in model.module.state_dict().items()
        if name.rpartition(".")[0] not in layers and name not in left_out(model.config)
    ]
    for name, layer in layers.items():
        read = partial(_weight, layer, dtype)
        tensors.append(StoredTensor(f"{name}.weight", dtype_code(dtype), layer.scheme.weight_shape, read))
        if layer.bias is not None:
            tensors.append(StoredTensor.of(f"{name}.bias", layer.bias))
    tensors = one_by_one(str(model.config["_class_name"]), tensors)
    form = stored_form(model.family, model.config, model.surgery)  # says all sizes, or `formats` refuses
    config = stock_config(replace(model, config=form.config))
    load = stock_way(str(model.config["_class_name"]), name_of(dtype))
    manifest = Manifest(kv_cache=model.kv_cache, history=tuple(model.history))
    ways, extra = ["compress.load(path)", load], {FILE_NAME: manifest.to_json()}
    return Layout(tensors, config, METADATA, ways, extra, _notes(model) + cache_notes(model, ways))


def _notes(model: OpenModel) -> tuple[str, ...]:
    """Say what rounding to floats gives up; a model without quantized layers is stored as it is."""
    if not model.quantization:
        return ()
    pruned = model.dense().parameters < model.spec.parameters
    than = "the pruned model before it was quantized" if pruned else "the original"
    return (f"weights are stored as floats, and activations are not quantized: no smaller than {than}",)


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    check(spec.quantization)
    tensors = unquantized(spec)
    for name, scheme in spec.quantization.items():
        tensors += linear_tensors(name, scheme, spec.dtype)
    return one_by_one(str(spec.config["_class_name"]), tensors), METADATA


def check(quantization: Mapping[str, QuantizedModule]) -> None:
    """Refuse what a plain weight cannot express.

    Raises:
        PlanError: naming a layer and the setting to change.
    """
    names = [name for name, scheme in quantization.items() if scheme.first_token is not None]
    if names:
        raise PlanError(
            f"dequantized format cannot express a stored first token ({names[0]}, {len(names)} such layers):"
            " a plain layer computes all tokens",
            hint="set first_token: quantize, or export with format: compress",
        )


def unquantized(spec: ModelSpec) -> list[StoredTensor]:
    """Return the tensors of a planned model that belong to no quantized layer, without tied copies."""
    return [
        StoredTensor(name, dtype_code(tensor.dtype), tensor.shape)
        for name, tensor in spec.tensors.items()
        if name.rpartition(".")[0] not in spec.quantization and name not in left_out(spec.config)
    ]


def linear_tensors(name: str, scheme: QuantizedModule, dtype: torch.dtype) -> list[StoredTensor]:
    """Return what a plain layer of this size stores."""
    code = dtype_code(dtype)
    weight = StoredTensor(f"{name}.weight", code, scheme.weight_shape)
    return [weight, StoredTensor(f"{name}.bias", code, (scheme.shape[0],))] if scheme.bias else [weight]


def in_memory(model: OpenModel) -> nn.Module:
    """Return the module that the exported folder must reproduce bit for bit."""
    module = replaced(model.module, lambda name, layer: _weight(layer, model.spec.dtype))
    return model.family.fuse(module)


def as_shipped(model: OpenModel) -> OpenModel:
    """Return the model that the folder holds; see `formats.as_shipped`."""
    return replace(model, module=in_memory(model), quantization={})


def _weight(layer: QuantizedLinear, dtype: torch.dtype) -> Tensor:
    return layer.equivalent_weight().to(dtype).view(layer.scheme.weight_shape)
