"""nf4 of the package bitsandbytes (arXiv 2305.14314): the format rounds the floating-point weights itself.

Its 16 values lie where weights are frequent, on no grid of integers, so it takes no layers that a stage has
rounded: a second rounding would add its error to the first. 64 weights share a scale; scales are not rounded
once more ("double quantization"). Layers of sizes that not every machine computes stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..models.base import Family, ModelSpec, OpenModel
from ..runtime.bitsandbytes_section import BLOCK, FEWEST_ROWS, NF4_VALUES, fits_nf4, nf4_scheme, stored_parts
from ..runtime.manifest import QuantizedModule
from ..runtime.modules import name_of
from .bitsandbytes_layout import folder_of, part_of, prediction_of, rounded_by_default
from .conversion import swapped
from .formats import Layout
from .writer import StoredTensor

ROUNDS = True
"""The format rounds what no stage has."""
_SMALLEST = 1e-38
_CHUNK = 2**22


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a stage has rounded layers, or none has a size that fits.
    """
    schemes = _schemes(model.family, model.module, model.quantization)
    return folder_of(model, schemes, lambda name: nf4(_weight(model.module, name)), _notes(model, schemes))


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    return prediction_of(spec, _schemes(spec.family, spec.meta_module(), spec.quantization))


def as_shipped(model: OpenModel) -> OpenModel:
    """Return the model that the folder holds, computed by the package; see `formats.as_shipped`.

    Raises:
        PlanError: as `layout`.
    """
    schemes = _schemes(model.family, model.module, model.quantization)
    layers = {name: _layer(model, name, scheme) for name, scheme in schemes.items()}
    return replace(model, module=swapped(model.module, layers), quantization=schemes)


def _schemes(
    family: Family, module: nn.Module, quantization: Mapping[str, QuantizedModule]
) -> dict[str, QuantizedModule]:
    if quantization:
        name, scheme = next(iter(quantization.items()))
        raise PlanError(
            f"bitsandbytes-nf4 format: {len(quantization)} layers are rounded already ({name} has"
            f" {scheme.bits} bits, made by {scheme.method}), and nf4 is another grid than that of integers",
            hint="leave that stage out, `stages: []` where it is the only one: the format rounds by itself;"
            " or export with format: compressed-tensors, which keeps the integers",
        )
    found = rounded_by_default(family, module)
    schemes = {
        name: nf4_scheme(shape, bias, f"nf4, {BLOCK} weights per scale")
        for name, (shape, bias) in found.items()
        if fits_nf4(shape)
    }
    if not schemes:
        raise PlanError(
            f"bitsandbytes-nf4 format: no linear layer has a multiple of {BLOCK} inputs and of {FEWEST_ROWS}"
            " outputs",
            hint="export with format: compressed-tensors or compress",
        )
    return schemes


def _weight(module: nn.Module, name: str) -> Tensor:
    weight: Tensor = module.get_submodule(name).weight.detach()  # type: ignore[operator]
    return weight


def nf4(weight: Tensor) -> dict[str, Tensor]:
    """Round a weight.

    Args:
        weight: [out, in], `fits_nf4`.

    Returns:
        `weight` uint8 [out * in / 2, 1] and `weight.absmax` float32 [out * in / 64].
    """
    values = torch.tensor(NF4_VALUES, device=weight.device)
    bounds = (values[:-1] + values[1:]) / 2
    packed, scales = [], []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        blocks = rows.float().reshape(-1, BLOCK)
        scale = blocks.abs().amax(dim=1)
        shares = (blocks * (1 / scale.clamp_min(_SMALLEST)).unsqueeze(1)).clamp_(-1, 1)
        places = torch.bucketize(shares.view(-1), bounds, out_int32=True).to(torch.uint8)
        packed.append((places[::2] << 4) | places[1::2])
        scales.append(scale)
    return {"weight": torch.cat(packed).unsqueeze(1), "weight.absmax": torch.cat(scales)}


def _layer(model: OpenModel, name: str, scheme: QuantizedModule) -> nn.Module:
    """Return the package's layer."""
    from .bitsandbytes_layers import Nf4Linear

    dense, dtype = model.module.get_submodule(name), model.spec.dtype
    assert isinstance(dense, nn.Linear)
    found = nf4(dense.weight.detach())
    stored = {
        part: part_of(scheme, name_of(dtype), part, lambda: found).to(dense.weight.device)
        for part in stored_parts(scheme, name_of(dtype))
    }
    return Nf4Linear(scheme.shape, stored, dense.bias, dtype)


def _notes(model: OpenModel, schemes: Mapping[str, QuantizedModule]) -> tuple[str, ...]:
    left = [name for name in rounded_by_default(model.family, model.module) if name not in schemes]
    notes = [
        "the format rounds the weights, to the nearest of its own 16 values: what was measured is the rounded"
        " model",
        "inputs are not rounded; a CPU with AVX512-BF16 computes these layers in bfloat16, whatever the"
        " model's dtype",
    ]
    if left:
        notes.append(
            f"{len(left)} layers stay in floating point, because the package computes no nf4 layer of their"
            f" sizes on every machine ({left[0]}): it needs a multiple of {BLOCK} inputs and of"
            f" {FEWEST_ROWS} outputs"
        )
    return tuple(notes)
