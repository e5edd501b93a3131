"""Is a pruned module whole: does everything that it says of itself fit its tensors, and does it run?

Stock code splits whatever width it gets into heads: with a stale number of heads it computes something
else, and nothing fails. So the numbers are compared first, and only then is the module run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.flags import keeping_flags
from ...errors import StageError
from ...models.base import OpenModel
from ...models.structure import AttentionSite
from .cutting import attribute_values, surgery_of
from .graph import find_groups
from .groups import Group

_SEED = 0
_SCALE_TOLERANCE = 1e-6


def check(model: OpenModel) -> list[Group]:
    """Check every size, then run the model forwards and backwards on random inputs.

    Flags, gradients, weights and random state stay as they are.

    Returns:
        The groups of the model as it is now.

    Raises:
        StageError: naming the layer that does not fit.
    """
    for name, child in model.module.named_modules():
        _check_layer(name, child)
    for site in model.family.structure(model.module).attentions:
        _check_attention(model.module, site)
    found = surgery_of(model.module, model.family, model.config)
    for name in {**found, **model.surgery}:
        if found.get(name) != model.surgery.get(name):
            raise StageError(f"{name}: what is noted of its sizes is not what it has")
    _run(model)
    return find_groups(model)  # every axis follows the channels of its group, or this refuses


def _check_layer(name: str, child: nn.Module) -> None:
    """Compare a layer's own numbers with its weight."""
    weight = child._parameters.get("weight")
    if weight is None or not isinstance(child, nn.Linear | nn.Conv2d | nn.LayerNorm):
        return
    shape = tuple(weight.shape)
    stated: tuple[int, ...]
    if isinstance(child, nn.Linear):
        stated = (child.out_features, child.in_features)
    elif isinstance(child, nn.LayerNorm):
        stated = tuple(child.normalized_shape)
    else:
        stated = (child.out_channels, child.in_channels // child.groups, *shape[2:])
    if shape != stated:
        raise StageError(f"{name}: its weight is {list(shape)}, and the layer says {list(stated)}")
    bias = child._parameters.get("bias")
    if bias is not None and bias.shape[0] != shape[0]:
        raise StageError(f"{name}: its bias has {bias.shape[0]} values for {shape[0]} outputs")


def _check_attention(module: nn.Module, site: AttentionSite) -> None:
    """Compare an attention's numbers with its projections, and with each other."""
    child = module.get_submodule(site.name)
    width = site.heads * site.head_dim
    for name in (site.q, site.k, site.v):
        found = module.get_submodule(name).out_features
        if found != width:
            raise StageError(
                f"{name}: {found} outputs, and {site.name} says {site.heads} heads of {site.head_dim}"
            )
    inputs = module.get_submodule(site.out).in_features
    if inputs != width:
        raise StageError(f"{site.out}: {inputs} inputs, and its heads make {width}")
    for attribute, wanted in attribute_values(site, site.heads, site.head_dim):
        value = getattr(child, attribute)
        if not math.isclose(value, wanted, rel_tol=_SCALE_TOLERANCE):
            raise StageError(f"{site.name}: {attribute} is {value}; its projections make it {wanted}")
    if site.table is not None:
        columns = module.get_parameter(site.table).shape[1]
        if columns != site.heads:
            raise StageError(f"{site.table}: {columns} columns for {site.heads} heads")


def _run(model: OpenModel) -> None:
    """Run forwards and backwards; name the layer at which it fails."""
    module = model.module
    inputs = model.family.example_inputs(module, 1, torch.Generator().manual_seed(_SEED))
    last = [""]
    handles = [
        child.register_forward_pre_hook(lambda _, __, name=name: last.__setitem__(0, name))
        for name, child in module.named_modules()
        if not list(child.children())
    ]
    parameters = {name: value for name, value in module.named_parameters() if value.is_floating_point()}
    try:
        with keeping_flags(module), torch.enable_grad():
            module.eval()
            for value in parameters.values():
                value.requires_grad_(True)
            loss = _mean_square(module(**inputs))
            if not bool(torch.isfinite(loss)):
                raise _not_finite(parameters)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f"{last[0]}: the pruned model does not run: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise StageError(f"{name}: the pruned model's gradient is not finite on random inputs")


def _not_finite(parameters: Mapping[str, Tensor]) -> StageError:
    for name, value in parameters.items():
        if not bool(torch.isfinite(value).all()):
            return StageError(f"{name}: a weight of the pruned model is not finite")
    return StageError("the pruned model's outputs are not finite on random inputs, though its weights are")


def _mean_square(output: Any) -> Tensor:
    """Return the mean square of all floating-point tensors of an output, float32."""
    found = [output[key] for key in output] if isinstance(output, dict) else list(output)
    values = [
        value.float().square().mean()
        for value in found
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return torch.stack(values).mean()
