"""Experts of an open model mixed with each other, behind routers whose weights are mapped to the mixtures.

Unlike what `experts` leaves, no stock class has this: routers keep all their rows, and a matrix makes the
weights of the new experts out of those of the old ones (`runtime.mapped_router`). The config says so, and
from there on the model is built, sized, saved and opened with such routers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..runtime.mapped_router import mapped
from ..runtime.mapped_routing import check_mappable, with_mapped_routers
from ..runtime.modules import place
from ..runtime.moe_config import moe_shape, with_expert_count
from .base import ModelSpec, OpenModel
from .expert_choice import check_counts, mixture_shape
from .experts import mixed, set_counts
from .mixtures import mixtures

Rows = Mapping[int, Tensor]
"""Decoder layer -> [experts that are left, experts] coefficients."""


def map_routers(
    module: nn.Module, config: Mapping[str, Any], mapping: Rows, mixing: Rows, *, active: int | None = None
) -> dict[str, Any]:
    """Mix experts of a stock module, and map its routers' weights to the mixtures, in place.

    Args:
        module: of the stock class, dense.
        config: its config, completed, with `_class_name`.
        mapping: of the routers' weights, of every layer with experts.
        mixing: of the experts' tensors, the same layers; row j makes the expert that row j of `mapping`
            weighs. Computed in float32.
        active: experts per token from now on; None: as many as before.

    Returns:
        the config of what is left.

    Raises:
        PlanError: routers of this class cannot be mapped; or coefficients of other shapes or layers, or
            that are not finite; or stock code could not route among so many experts.
    """
    left = mapped_config(config, _count(config, mapping, mixing), active)
    router_active = moe_shape(left).routing.active
    for mixture in mixtures(module):
        rows = mixing[mixture.layer].detach()
        for name, tensor in mixture.expert_tensors().items():
            before = getattr(mixture.experts, name)
            place(mixture.experts, name, mixed(tensor, rows), requires_grad=before.requires_grad)
        router = mapped(mixture.router, mapping[mixture.layer], config["_class_name"], active=router_active)
        setattr(mixture.block, mixture.router_name, router)
    set_counts(module, left)
    return left


def map_routers_of(model: OpenModel, mapping: Rows, mixing: Rows, *, active: int | None = None) -> None:
    """Do `map_routers` to an open model; its config says so afterwards.

    Raises:
        PlanError: as `map_routers`, or the model is quantized.
    """
    if model.quantization:
        raise PlanError(
            "the model is quantized; experts are mixed in models in floating point",
            hint="put the mixing of experts before the quantizer",
        )
    model.config = map_routers(model.module, model.config, mapping, mixing, active=active)


def mapped_routers_spec(spec: ModelSpec, count: int, active: int | None = None) -> ModelSpec:
    """Return the spec of a dense model with `count` experts in every layer, behind mapped routers.

    Raises:
        PlanError: such a model cannot be left, or its routers cannot be mapped.
    """
    return spec.cut(spec.surgery, mapped_config(spec.config, count, active))


def mapped_config(config: Mapping[str, Any], count: int, active: int | None = None) -> dict[str, Any]:
    """Return the config of a model with `count` experts in every layer, behind mapped routers.

    Args:
        config: completed, with `_class_name`.
        count: experts that are left.
        active: experts per token; None: as many as before.

    Raises:
        PlanError: such a model cannot be left, or its routers cannot be mapped.
    """
    check_counts(config, count, active)
    check_mappable(config)
    return with_mapped_routers(with_expert_count(config, count, active), moe_shape(config).routing.experts)


def _count(config: Mapping[str, Any], mapping: Rows, mixing: Rows) -> int:
    """Return how many experts are left, after everything about the coefficients is checked."""
    shape = mixture_shape(config)
    counts = set()
    for what, rows in (("mapping of the router's weights", mapping), ("coefficients of the experts", mixing)):
        others = sorted(rows.keys() - set(shape.sparse))
        missing = sorted(set(shape.sparse) - rows.keys())
        if others:
            raise PlanError(f"{what}: layer {others[0]} has no experts")
        if missing:
            raise PlanError(
                f"{what}: nothing is said of layer {missing[0]}", hint="name every layer with experts"
            )
        for layer, values in rows.items():
            if values.ndim != 2 or values.shape[1] != shape.routing.experts:
                raise PlanError(
                    f"layer {layer}: {what}: {list(values.shape)}; a column is needed for each of the"
                    f" {shape.routing.experts} experts"
                )
            if not bool(torch.isfinite(values).all()):
                raise PlanError(f"layer {layer}: {what}: not finite")
            counts.add(values.shape[0])
    if len(counts) != 1:
        raise PlanError(
            f"coefficients make {min(counts)} to {max(counts)} experts; all layers must be left with"
            " equally many"
        )
    return counts.pop()
