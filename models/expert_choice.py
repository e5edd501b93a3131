"""Which experts of a mixture-of-experts model may be left, and the config of what is left. Torch-free.

Every layer keeps equally many: no stock class builds layers that differ in their number of experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import PlanError
from ..runtime.mapped_routing import KEY, is_mapped, with_mapped_routers
from ..runtime.moe_classes import MOE_CLASSES, is_moe_class
from ..runtime.moe_config import MoeShape, moe_shape, routing_problem, with_expert_count

Kept = Mapping[int, tuple[int, ...]]
"""Decoder layer -> experts that stay, ascending; every layer that has experts is named."""


def mixture_shape(config: Mapping[str, Any]) -> MoeShape:
    """Return the sizes of a model that has experts.

    Args:
        config: completed, with `_class_name`.

    Raises:
        PlanError: it is no mixture of experts, or none of its layers is.
    """
    name = config["_class_name"]
    if not is_moe_class(name):
        raise PlanError(
            f"{name} is not a mixture of experts", hint=f"those that are known: {', '.join(MOE_CLASSES)}"
        )
    shape = moe_shape(config)
    if not shape.sparse:
        raise PlanError(f"none of the {shape.layers} layers of this {name} has experts, says its config")
    return shape


def check_counts(config: Mapping[str, Any], count: int, active: int | None = None) -> None:
    """Refuse numbers of experts with which stock code could not route.

    Args:
        config: completed, with `_class_name`.
        count: experts that stay in each layer.
        active: experts per token; None: as many as before.

    Raises:
        PlanError: naming what does not fit.
    """
    shape = mixture_shape(config)
    routing = shape.routing
    if routing.mapped_from is not None:
        raise PlanError(
            f"the routers of this {config['_class_name']} are mapped already, from {routing.mapped_from}"
            " experts",
            hint="start from the model as it was before its routers were mapped",
        )
    if not 1 <= count <= routing.experts:
        raise PlanError(f"{count} experts to stay, of {routing.experts} in every layer")
    wanted = routing.active if active is None else active
    if not 1 <= wanted <= routing.active:
        raise PlanError(f"{wanted} experts per token; the model was trained with {routing.active}")
    if count % routing.groups:
        raise PlanError(
            f"{config['_class_name']}: {count} of {routing.experts} experts to stay, but the router has"
            f" {routing.groups} groups of experts, which all keep equally many",
            hint=f"keep a multiple of {routing.groups}",
        )
    problem = routing_problem(replace(routing, experts=count, active=wanted))
    if problem:
        raise PlanError(
            f"{config['_class_name']}: {problem}", hint="keep more experts, or use fewer per token"
        )


def checked_experts(
    config: Mapping[str, Any], kept: Mapping[int, Sequence[int]], active: int | None = None
) -> dict[int, tuple[int, ...]]:
    """Return the experts that stay, ascending, layer by layer.

    Args:
        config: completed, with `_class_name`.
        kept: layer -> experts, in any order.
        active: experts per token; None: as many as before.

    Raises:
        PlanError: a layer without experts or a missing one, an expert that is not there or is named twice,
            layers that keep differently many, groups of experts that do, or as `check_counts`.
    """
    shape = mixture_shape(config)
    _check_named(shape, kept)
    found = {layer: _checked(layer, kept[layer], shape.routing.experts) for layer in shape.sparse}
    first = shape.sparse[0]
    for layer, experts in found.items():
        if len(experts) != len(found[first]):
            raise PlanError(
                f"layer {layer} keeps {len(experts)} experts and layer {first} keeps {len(found[first])};"
                " all must keep equally many",
                hint="no stock class builds layers with different numbers of experts",
            )
    check_counts(config, len(found[first]), active)
    if shape.routing.groups > 1:
        for layer, experts in found.items():
            _check_groups(layer, experts, shape)
    return found


def fewer_experts(
    config: Mapping[str, Any], kept: Mapping[int, Sequence[int]], active: int | None = None
) -> dict[str, Any]:
    """Return the config of the model that is left.

    Raises:
        PlanError: as `checked_experts`.
    """
    chosen = checked_experts(config, kept, active)
    return with_expert_count(config, len(next(iter(chosen.values()))), active)


def with_counts_of(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the numbers of experts that another one says; as it is where it has no experts.

    If the other one says that routers are mapped, so does it.

    Args:
        config: completed, with `_class_name`.
        other: config.json of what is left of the same model.
    """
    name = config["_class_name"]
    if not is_moe_class(name):
        return dict(config)
    before, after = moe_shape(config).routing, moe_shape({**other, "_class_name": name}).routing
    active = None if after.active == before.active else after.active
    changed = dict(config)
    if active is not None or after.experts != before.experts:
        changed = with_expert_count(config, after.experts, active)
    return with_mapped_routers(changed, int(other[KEY])) if is_mapped(other) else changed


def _check_named(shape: MoeShape, kept: Mapping[int, Sequence[int]]) -> None:
    for layer in kept:
        if layer not in shape.sparse:
            have = f"layers with experts: {_ranges(shape.sparse)}"
            raise PlanError(f"layer {layer} has no experts", hint=have)
    missing = [layer for layer in shape.sparse if layer not in kept]
    if missing:
        raise PlanError(
            f"nothing is said of the experts of layer {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            hint=f"name every layer with experts: {_ranges(shape.sparse)}",
        )


def _checked(layer: int, experts: Sequence[int], count: int) -> tuple[int, ...]:
    chosen = tuple(sorted(int(expert) for expert in experts))
    if not chosen:
        raise PlanError(f"layer {layer} keeps no expert", hint="keep as many as a token goes through")
    if len(set(chosen)) != len(chosen):
        raise PlanError(f"layer {layer}: an expert is named twice in {list(experts)}")
    if chosen[0] < 0 or chosen[-1] >= count:
        raise PlanError(f"layer {layer}: {list(experts)} goes beyond the experts, which are 0 to {count - 1}")
    return chosen


def _check_groups(layer: int, experts: tuple[int, ...], shape: MoeShape) -> None:
    groups = shape.routing.groups
    size = shape.routing.experts // groups
    counts = [sum(expert // size == group for expert in experts) for group in range(groups)]
    if len(set(counts)) > 1:
        raise PlanError(
            f"layer {layer} keeps {counts} experts of its {groups} groups; the router needs equally many in"
            " each",
            hint=f"a group has {size} experts, in order",
        )


def _ranges(layers: Sequence[int]) -> str:
    """Write ascending numbers shortly: 1, 3-5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
