"""Equal widths again: a cut model in the sizes of its widest layers, filled up with zeros.

Zero channels compute nothing: an inner channel without weights is 0 before and behind its activation, and
a head without values adds nothing. Queries take the quotient of the two softmax scales, since the stock
class goes by the channels that a head has then. What comes out loads with the stock class alone and gives
the same outputs up to rounding; it has the cut model's accuracy, but not its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError, StageError
from ..models.base import Family, ModelSpec, OpenModel
from ..models.building import empty_module
from ..models.shapes import expected_shapes
from ..models.structure import AttentionSite
from ..runtime.manifest import ModuleSurgery
from ..runtime.modules import place
from .form import stored_form

TOLERANCE = 1e-5  # in float32, of the largest output where that is above 1
_ROUNDINGS = 16  # of a smaller type: each of some layers rounds a query anew


def check_padded(spec: ModelSpec, format: str) -> None:
    """Refuse a recipe whose result cannot be padded.

    Raises:
        PlanError: with the reason.
    """
    hint = "leave `padded` out of the export"
    if format not in ("compress", "dequantized"):
        raise PlanError(
            f"export.padded: the format {format} stores quantized layers, and none is padded", hint=hint
        )
    if spec.quantization:
        first = min(spec.quantization)
        raise PlanError(f"export.padded: layer {first} is quantized; only dense layers are padded", hint=hint)
    if not spec.surgery:
        raise PlanError(
            "export.padded: no stage of the recipe cuts anything, so nothing would be padded", hint=hint
        )


def padded_spec(spec: ModelSpec, format: str) -> ModelSpec:
    """Return the spec of what is written of a planned model.

    Raises:
        PlanError: the stock config cannot say its sizes, or there is nothing to pad.
    """
    check_padded(spec, format)
    return spec.cut({}, _config(spec.family, spec.config, spec.surgery))


def _config(
    family: Family, config: Mapping[str, Any], surgery: Mapping[str, ModuleSurgery]
) -> dict[str, Any]:
    name = config["_class_name"]
    found = family.padded_config(config, surgery)
    if found is not None:
        old, new = expected_shapes(name, config), expected_shapes(name, found)
        if all(_fits(shape, old[key]) for key, shape in new.items()):
            return found
    raise PlanError(
        f"export.padded: the config of {name} has no sizes between those of the pruned layers and those of"
        " the original, so padding would give the original back",
        hint="leave `padded` out; compress.load reads the folder, and so does the stock class after `import"
        " compress`",
    )


def _fits(inner: tuple[int, ...], outer: tuple[int, ...]) -> bool:
    return len(inner) == len(outer) and all(a <= b for a, b in zip(inner, outer, strict=True))


def pad(model: OpenModel) -> OpenModel:
    """Return the padded model; `model` is left as it is, and tensors of equal shape are shared.

    Raises:
        PlanError: the stock config cannot say its sizes.
        StageError: the padded model computes something else.
    """
    if not model.surgery:
        return model
    native = stored_form(model.family, model.config, model.surgery)
    if not native.surgery and "per_layer_config" not in native.config:
        return replace(model, config=native.config, surgery={})  # equal widths: there is nothing to fill up
    config = _config(model.family, model.config, model.surgery)
    module = _filled(model, config)
    _check_equal(model, module)
    return replace(model, module=module, config=config, surgery={})


def _filled(model: OpenModel, config: Mapping[str, Any]) -> nn.Module:
    module = empty_module(model.family, config)
    before = {site.name: site for site in model.family.structure(model.module).attentions}
    state = dict(model.module.state_dict())
    for site in model.family.structure(module).attentions:
        _split_heads(state, model.module, before[site.name], site)
    device = next(model.module.parameters()).device
    for name, empty in dict(module.state_dict()).items():
        place(module, name, _grown(state[name], tuple(empty.shape)))
    return module.to(device).eval()


def _split_heads(state: dict[str, Tensor], cut: nn.Module, old: AttentionSite, new: AttentionSite) -> None:
    """Put zeros behind the channels of every head, and heads of zeros behind the others."""
    heads, wide = old.heads, new.head_dim
    scale = next(name for name, meaning in old.attributes.items() if meaning == "scale")
    factor = float(getattr(cut.get_submodule(old.name), scale)) * wide**0.5
    for linear in (old.q, old.k, old.v):
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name not in state:
                continue
            tensor = state[name] * factor if linear == old.q and factor != 1.0 else state[name]
            rest = tuple(tensor.shape[1:])
            split = tensor.reshape(heads, old.head_dim, *rest)
            state[name] = _grown(split, (new.heads, wide, *rest)).reshape(new.heads * wide, *rest)
    weight = state[f"{old.out}.weight"]
    rows = weight.shape[0]
    split = weight.reshape(rows, heads, old.head_dim)
    state[f"{old.out}.weight"] = _grown(split, (rows, new.heads, wide)).reshape(rows, new.heads * wide)


def _grown(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor with zeros behind it on every axis; itself where it has that shape."""
    if tuple(tensor.shape) == shape:
        return tensor
    result = tensor.new_zeros(shape)
    result[tuple(slice(length) for length in tensor.shape)] = tensor
    return result


def _check_equal(model: OpenModel, module: nn.Module) -> None:
    """Hold the padded module's outputs against those of the cut one."""
    inputs = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (each(**inputs, return_dict=False)[0].double() for each in (model.module, module))
    epsilon = torch.finfo(next(module.parameters()).dtype).eps
    limit = max(TOLERANCE, _ROUNDINGS * epsilon if epsilon > 1e-6 else 0.0)
    limit *= max(1.0, float(expected.abs().max()))
    error = float((expected - found).abs().max())
    if not error <= limit:
        raise StageError(
            f"padding changes outputs by up to {error:.3g}; at most {limit:.3g} is rounding",
            hint="export without padded, and report this",
        )


def padding_notes(model: OpenModel, shipped: OpenModel) -> tuple[str, ...]:
    """Say what padding costs, for the report and the card.

    Args:
        model: that was cut.
        shipped: `pad` of it.
    """
    cut, full = model.size(), shipped.size()
    if full.parameters == cut.parameters:
        return ("padded: all layers have equal widths already, so nothing was filled up",)
    return (
        f"padded with zeros to equal widths, for the stock class: {full.parameters:,} parameters and"
        f" {full.macs:,} multiply-accumulates; the pruned model itself has {cut.parameters:,} and"
        f" {cut.macs:,}",
    )
