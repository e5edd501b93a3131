"""LLM.int8 of the package bitsandbytes (arXiv 2208.07339): integers with one symmetric scale per output.

That is the grid of `rtn` at 8 bits, so layers that a stage rounded to it are stored as they are; where no
stage has rounded any, the format rounds to nearest itself. The package rounds inputs while it runs, token by
token and in half precision; channels with values beyond 6 it multiplies in half precision instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..models.base import ModelSpec, OpenModel
from ..runtime.bitsandbytes_section import int8_scheme
from ..runtime.linear import QuantizedLinear
from ..runtime.manifest import QuantizedModule
from .bitsandbytes_layout import folder_of, prediction_of, rounded_by_default
from .conversion import swapped
from .formats import Layout
from .refusing import KEEP, Reasons, refuse_inexpressible
from .writer import StoredTensor

ROUNDS = True
"""The format rounds what no stage has."""
_TOP = 127
_SMALLEST = torch.finfo(torch.float32).tiny


def layout(model: OpenModel) -> Layout:
    """Describe the folder of a model; see `formats.Layout`.

    Raises:
        PlanError: a layer has what LLM.int8 has no place for; see `check`.
    """
    schemes = _schemes(model)
    return folder_of(model, schemes, lambda name: _stored(model.module, name), _notes(model))


def predict(spec: ModelSpec) -> tuple[list[StoredTensor], Mapping[str, str]]:
    """Return what `layout` will store of a planned model.

    Raises:
        PlanError: as `layout`.
    """
    if spec.quantization:
        check(spec.quantization)
        schemes = {name: _kept(scheme) for name, scheme in spec.quantization.items()}
        return prediction_of(spec, schemes)
    return prediction_of(spec, _rounded(rounded_by_default(spec.family, spec.meta_module())))


def as_shipped(model: OpenModel) -> OpenModel:
    """Return the model that the folder holds, computed by the package; see `formats.as_shipped`.

    Raises:
        PlanError: as `layout`.
    """
    from .bitsandbytes_layers import int8_linear

    schemes, layers = _schemes(model), {}
    for name, scheme in schemes.items():
        bias: Tensor | None = getattr(model.module.get_submodule(name), "bias", None)
        layers[name] = int8_linear(scheme.shape, _stored(model.module, name), bias)
    return replace(model, module=swapped(model.module, layers), quantization=schemes)


def check(quantization: Mapping[str, QuantizedModule]) -> None:
    """Refuse layers of stages that LLM.int8 cannot express.

    Raises:
        PlanError: naming the layers and the setting to change.
    """
    refuse_inexpressible("bitsandbytes-int8", quantization, _REASONS)


_REASONS: Reasons = {
    "other than 8 bits; set weight_bits: 8, or leave the stage out and use bitsandbytes-nf4": (
        lambda s: s.bits != 8
    ),
    "asymmetric weights; set weight_symmetric: true": lambda s: not s.symmetric,
    "weight groups; set group_size: null": lambda s: s.group_size is not None,
    "a rotation; set rotation: none": lambda s: s.rotation is not None,
    "a low-rank branch; set low_rank: 0": lambda s: s.low_rank > 0,
    "quantized convolutions; keep the convolutions": lambda s: s.kernel is not None,
    "a stored first token; set first_token: quantize": lambda s: s.first_token is not None,
    "static activations; set activation_scale: token": lambda s: (
        s.activation is not None and s.activation.scope == "tensor"
    ),
    "activations that are not 8-bit symmetric; set activation_bits: 8 and activation_symmetric: true": (
        lambda s: s.activation is not None and (s.activation.bits != 8 or not s.activation.symmetric)
    ),
    f"channel scales of inputs that no layer before them absorbs; set {KEEP}, or use rtn": (
        lambda s: s.input_scale
    ),
}


def _kept(scheme: QuantizedModule) -> QuantizedModule:
    """Return the scheme of a layer of a stage as the package computes it."""
    stored = int8_scheme(scheme.shape, scheme.bias, scheme.decided_by)
    return stored.model_copy(update={"method": scheme.method})


def _rounded(found: Mapping[str, tuple[tuple[int, int], bool]]) -> dict[str, QuantizedModule]:
    return {name: int8_scheme(shape, bias, "LLM.int8") for name, (shape, bias) in found.items()}


def _schemes(model: OpenModel) -> dict[str, QuantizedModule]:
    if not model.quantization:
        return _rounded(rounded_by_default(model.family, model.module))
    check(model.quantization)
    return {name: _kept(scheme) for name, scheme in model.quantization.items()}


def _stored(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return `weight` int8 [out, in] and `SCB` float32 [out] of a layer."""
    layer = module.get_submodule(name)
    if isinstance(layer, QuantizedLinear):
        return {"weight": layer.levels(), "SCB": layer.scale.float().view(-1) * _TOP}
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().float()
    largest = weight.abs().amax(dim=1)
    level = weight * (_TOP / largest.clamp_min(_SMALLEST)).unsqueeze(1)
    return {"weight": level.round_().to(torch.int8), "SCB": largest}


def _notes(model: OpenModel) -> tuple[str, ...]:
    schemes = model.quantization.values()
    notes = ["inputs are rounded by the package's own rule, and cast to half precision before"]
    if any(scheme.activation is None for scheme in schemes):
        notes.append("the recipe leaves inputs in floating point, which the package does not")
    if not schemes:
        notes.append("the format rounds the weights to nearest: what was measured is the rounded model")
    return tuple(notes)
