"""What both formats of the package bitsandbytes share: the folder around the layers, and its prediction.

Each hands in its schemes and, for a model with weights, what its layers store. Written from the layout alone
(`runtime.bitsandbytes_section`) and for version 0.50 of the package, which tests hold it against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..models.base import Family, ModelSpec, OpenModel
from ..recipes.patterns import select
from ..runtime.bitsandbytes_section import QUANT_METHOD, WRITTEN_FOR, fixed_values, section_of, stored_parts
from ..runtime.manifest import FILE_NAME, Manifest, QuantizedModule
from ..runtime.modules import name_of
from ..runtime.stored_tensors import TORCH_DTYPES
from .compress_format import METADATA, cache_notes, check_cache, stock_config
from .formats import Layout
from .stock import left_out, stock_way
from .writer import StoredTensor, dtype_code

Schemes = Mapping[str, QuantizedModule]
Encode = Callable[[str], Mapping[str, Tensor]]
"""Returns the tensors of a layer that its weights decide, by their names in the layer."""


def rounded_by_default(family: Family, module: nn.Module) -> dict[str, tuple[tuple[int, int], bool]]:
    """Return the linears that a format rounds where no stage has: name -> ((out, in), has a bias).

    What quantizers leave in floating point by default stays so here, too.
    """
    sites = family.linears(module)
    kept = select(family.default_keep(), [site.name for site in sites])
    biased = {name for name, _ in module.named_parameters() if name.endswith(".bias")}
    return {site.name: (site.shape, f"{site.name}.bias" in biased) for site in sites if site.name not in kept}


def folder_of(model: OpenModel, schemes: Schemes, encode: Encode, notes: tuple[str, ...]) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Args:
        model: with its weights.
        schemes: of the layers that the package computes.
        encode: called when a layer is written.
        notes: of the format.
    """
    check_cache(model)
    class_name, dtype = str(model.config["_class_name"]), name_of(model.spec.dtype)
    gone = left_out(model.config)
    tensors = []
    for name, tensor in model.module.state_dict().items():
        layer, _, suffix = name.rpartition(".")
        if name not in gone and (layer not in schemes or suffix == "bias"):
            tensors.append(StoredTensor.of(name, tensor))
    for name, scheme in schemes.items():
        for part, (code, shape) in stored_parts(scheme, dtype).items():
            read = partial(part_of, scheme, dtype, part, partial(encode, name))
            tensors.append(StoredTensor(f"{name}.{part}", code, shape, read))
    config = stock_config(model)
    floats = [site.name for site in model.linears() if site.name not in schemes]
    config["quantization_config"] = section_of(next(iter(schemes.values())).bits, dtype, floats)
    manifest = Manifest(kv_cache=model.kv_cache, history=tuple(model.history))
    ways = [stock_way(class_name, dtype), "compress.load(path)"]
    told = (f"written in the layout of {QUANT_METHOD} {WRITTEN_FOR}", *notes, *cache_notes(model, ways))
    return Layout(tensors, config, METADATA, ways, {FILE_NAME: manifest.to_json()}, told)


def part_of(
    scheme: QuantizedModule, dtype: str, part: str, encode: Callable[[], Mapping[str, Tensor]]
) -> Tensor:
    """Return one tensor of a layer."""
    fixed = fixed_values(scheme, dtype)
    if part not in fixed:
        return encode()[part]
    code, shape = stored_parts(scheme, dtype)[part]
    return torch.frombuffer(bytearray(fixed[part]), dtype=TORCH_DTYPES[code]).view(shape)


def prediction_of(spec: ModelSpec, schemes: Schemes) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `folder_of` will store of a planned model."""
    gone = left_out(spec.config)
    tensors = []
    for name, tensor in spec.tensors.items():
        layer, _, suffix = name.rpartition(".")
        if name not in gone and (layer not in schemes or suffix == "bias"):
            tensors.append(StoredTensor(name, dtype_code(tensor.dtype), tensor.shape))
    for name, scheme in schemes.items():
        parts = stored_parts(scheme, name_of(spec.dtype))
        tensors += [StoredTensor(f"{name}.{part}", code, shape) for part, (code, shape) in parts.items()]
    return tensors, METADATA
