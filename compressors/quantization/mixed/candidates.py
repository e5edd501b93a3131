"""What may be chosen for every layer: schemes by bits, and the bytes that each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ....errors import PlanError
from ....models.base import Family, LinearSite, TensorSpec
from ....recipes.allocation import FLOAT_BITS, AllocationSettings
from ....recipes.patterns import select
from ....recipes.stages import MixdqSettings, ViditQSettings
from ....runtime.manifest import ActivationScheme, QuantizedModule
from ....runtime.moe_names import expert_linear
from ..details import scheme_bytes
from ..scheme import Survey, linear_scheme, modulation_scheme, options_of
from .fixing import Fixed, by_pattern, refuse_twice_decided
from .groups import MetricGroup, group_layers
from .offers import FLOAT_LABEL, label_of_weight

AllocatingSettings = MixdqSettings | ViditQSettings
"""Settings of the methods that choose bits per layer; of ViDiT-Q where `bits` is given."""

Settle = Callable[[str, QuantizedModule], QuantizedModule]
"""Called with a layer's name and its planned scheme; returns the one with the transforms decided on data."""


@dataclass(frozen=True)
class LayerChoices:
    """A layer and what may be chosen for it.

    Attributes:
        site: the layer; of tied copies the one whose tensors are stored.
        schemes: label ("w2" ... "w8") -> scheme as stored, its activation at the fewest bits offered;
            "w16", which is floating point, has none.
        costs: label ("w16" included where offered) -> bytes of all tensors of the layer, bias included; tied
            copies once.
        weights: number of weights, tied copies once.
        inputs: elements of the layer's input in one forward of one sample; 0 where it is not known.
        metric_group: name of the group that it is measured in.
        activations: offered activation bits; 16 is floating point.
        decided_by: the rule or pattern where there is one choice only.
        members: names of the layers that are this one weight, the site's own first; empty: it alone.
        together: layers with weights of their own that take the same choice, the site's own first, each as if
            it stood alone; `costs`, `weights` and `inputs` are then those of all of them. Empty: it alone.
    """

    site: LinearSite
    schemes: Mapping[str, QuantizedModule]
    costs: Mapping[str, int]
    weights: int
    inputs: int
    metric_group: str
    activations: tuple[int, ...]
    decided_by: str
    members: tuple[str, ...] = ()
    together: tuple[LayerChoices, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers that take the choice."""
        if self.together:
            return tuple(single.site.name for single in self.together)
        return self.members or (self.site.name,)

    @property
    def singles(self) -> tuple[LayerChoices, ...]:
        """The layers with weights of their own, each as if it stood alone."""
        return self.together or (self,)

    def stored(self, name: str) -> LayerChoices:
        """Return the layer whose weight one of `names` has: itself, or of tied copies the stored one."""
        return next((single for single in self.together if single.site.name == name), self)


@dataclass(frozen=True)
class Candidates:
    """All layers that take part in an allocation.

    Attributes:
        layers: in forward order, copies left out.
        groups: what they are measured by.
        float_rules: the linears that take no part -> the rule that decided.
    """

    layers: tuple[LayerChoices, ...]
    groups: tuple[MetricGroup, ...]
    float_rules: Mapping[str, str]

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Metric of every group, by its name."""
        return {group.name: group.metric for group in self.groups}

    @property
    def names(self) -> frozenset[str]:
        """All layers that take part, copies included."""
        return frozenset(name for layer in self.layers for name in layer.names)


def allocation_of(settings: AllocatingSettings) -> AllocationSettings:
    """Return how bits are chosen."""
    allocation = settings.allocation
    assert allocation is not None
    return allocation


def find_candidates(
    family: Family,
    survey: Survey,
    settings: AllocatingSettings,
    dtype: torch.dtype,
    shared: Mapping[str, str],
    *,
    settle: Settle | None = None,
    inputs: Mapping[str, int] | None = None,
) -> Candidates:
    """Find out what may be chosen for every layer.

    A rule earlier in this list wins: a pattern of `keep`; one of `fixed`; `adaln_weight_bits` for
    modulation layers (below 16, a pattern of `fixed` beside it is refused); the family's own list of
    layers left in floating point; embedders and heads in floating point; the bits of the layer's group,
    or of the stage, for the rest.

    Args:
        family: of the model.
        survey: of its linears.
        settings: of the stage.
        dtype: that the model is stored in.
        shared: copied tensor -> stored tensor.
        settle: adds what was decided on data to a planned scheme; None: nothing is decided yet.
        inputs: layer -> elements of its input; None: not known.

    Raises:
        PlanError: a pattern of `fixed`, `fixed_activations` or a group decides nothing, two of them give
            a layer different bits, `group_size` does not divide a
            layer's inputs, or tied layers would get scales of their own.
    """
    float_rules = {**survey.float_rules, **_float_modulations(survey, settings)}
    sites = [site for site in survey.sites if site.name not in float_rules]
    allocation = allocation_of(settings)
    roles = {site.name: str(site.role) for site in sites}
    fixed, fixed_activations = _fixed(settings, roles)
    groups = group_layers(family.name, roles, allocation.groups)
    group_of = {name: group.name for group in groups for name in group.layers}
    layers = []
    for site in sites:
        group = group_of[site.name]
        bits, rule = _offered_bits(site, settings, group, fixed)
        activations = _offered_activations(site, settings, group, fixed_activations)
        schemes = {
            label_of_weight(number): _scheme(survey, site, settings, number, activations, rule)
            for number in bits
            if number != FLOAT_BITS
        }
        if settle is not None:
            schemes = {label: settle(site.name, scheme) for label, scheme in schemes.items()}
        costs = {label: scheme_bytes(scheme, dtype) for label, scheme in schemes.items()}
        if FLOAT_BITS in bits:
            costs[FLOAT_LABEL] = _float_bytes(site, site.name in survey.biased, dtype)
        elements, weights = (inputs or {}).get(site.name, 0), site.shape[0] * site.shape[1]
        layers.append(LayerChoices(site, schemes, costs, weights, elements, group, activations, rule))
    joined = _with_experts(_joined(layers, shared), allocation)
    if options_of(settings).act_exponent is not None:
        _refuse_tied(joined)
    return Candidates(tuple(joined), tuple(groups), float_rules)


def bytes_outside(tensors: Mapping[str, TensorSpec], shared: Mapping[str, str], names: frozenset[str]) -> int:
    """Return the bytes of the stored tensors that belong to none of the layers `names`."""
    return sum(
        spec.bytes
        for tensor, spec in tensors.items()
        if tensor not in shared and tensor.rpartition(".")[0] not in names
    )


def _float_modulations(survey: Survey, settings: AllocatingSettings) -> dict[str, str]:
    if settings.adaln_weight_bits != FLOAT_BITS:
        return {}
    fixed = select(list(allocation_of(settings).fixed), [site.name for site in survey.sites])
    return {
        site.name: f"adaln_weight_bits: {FLOAT_BITS}"
        for site in survey.sites
        if site.role == "adaln" and site.name not in survey.float_rules and site.name not in fixed
    }


def _fixed(settings: AllocatingSettings, roles: Mapping[str, str]) -> tuple[Fixed, Fixed]:
    """Return the weights and the inputs that patterns decide."""
    allocation = allocation_of(settings)
    fixed = by_pattern("fixed", allocation.fixed, roles)
    modulations = [name for name, role in roles.items() if role == "adaln"]
    refuse_twice_decided(fixed, modulations, settings.adaln_weight_bits)
    excluded = _without_activations(roles, fixed)
    return fixed, by_pattern("fixed_activations", allocation.fixed_activations, roles, excluded)


def _without_activations(roles: Mapping[str, str], fixed: Fixed) -> dict[str, str]:
    """Return the layers whose inputs stay in floating point whatever is asked, with the reason."""
    return {
        name: "modulation layers are weight-only"
        if role == "adaln"
        else f"fixed: {fixed[name][1]!r} leaves the layer in floating point"
        for name, role in roles.items()
        if role == "adaln" or (name in fixed and fixed[name][0] == FLOAT_BITS)
    }


def activation_of(
    entry: LayerChoices, survey: Survey, settings: AllocatingSettings, bits: int
) -> ActivationScheme | None:
    """Return how the input of a layer is quantized at some bits; None where it stays in floating point."""
    if entry.site.role == "adaln" or not entry.schemes:
        return None
    number = next(iter(entry.schemes.values())).bits
    return linear_scheme(survey, entry.site, settings, number, bits, "").activation


def _offered_bits(
    site: LinearSite, settings: AllocatingSettings, group: str, fixed: Fixed
) -> tuple[tuple[int, ...], str]:
    """Return the bits that are offered to a layer, in rising order, and the rule."""
    if site.name in fixed:
        number, pattern = fixed[site.name]
        return (number,), f"fixed: {pattern}"
    if site.role == "adaln" and settings.adaln_weight_bits is not None:
        return (settings.adaln_weight_bits,), f"adaln_weight_bits: {settings.adaln_weight_bits}"
    allocation = allocation_of(settings)
    own = (allocation.groups or {}).get(group)
    bits = allocation.bits if own is None or own.bits is None else own.bits
    return tuple(sorted(bits)), f"bits: allocated in group {group}"


def _offered_activations(
    site: LinearSite, settings: AllocatingSettings, group: str, fixed: Fixed
) -> tuple[int, ...]:
    if site.role == "adaln":
        return (FLOAT_BITS,)
    if site.name in fixed:
        return (fixed[site.name][0],)
    allocation = allocation_of(settings)
    own = (allocation.groups or {}).get(group)
    offered = (
        allocation.activation_bits if own is None or own.activation_bits is None else own.activation_bits
    )
    return tuple(sorted(offered))


def _scheme(
    survey: Survey,
    site: LinearSite,
    settings: AllocatingSettings,
    bits: int,
    activations: tuple[int, ...],
    rule: str,
) -> QuantizedModule:
    if site.role == "adaln":
        return modulation_scheme(survey, site, settings.method, bits, rule)
    return linear_scheme(survey, site, settings, bits, activations[0], rule)


def _float_bytes(site: LinearSite, biased: bool, dtype: torch.dtype) -> int:
    rows, columns = site.shape
    return (rows * columns + (rows if biased else 0)) * dtype.itemsize


def _with_experts(layers: list[LayerChoices], allocation: AllocationSettings) -> list[LayerChoices]:
    """Make one entry of what is to be chosen alike: all gates of the experts of a layer, all ups, all downs.

    Experts that a pattern treats otherwise than the others are entries of their own.

    Raises:
        PlanError: experts are to have choices of their own, and there are none.
    """
    if allocation.experts == "each":
        if not any(expert_linear(layer.site.name) for layer in layers):
            raise PlanError("experts: each has no effect: no expert is allocated", hint="take the key out")
        return layers
    found: dict[tuple[Any, ...], list[LayerChoices]] = {}
    for layer in layers:
        expert = expert_linear(layer.site.name)
        key: tuple[Any, ...] = (layer.site.name,)
        if expert is not None:
            offered = tuple(layer.costs), layer.activations, layer.metric_group, layer.decided_by
            key = (expert[0], expert[2], *offered)
        found.setdefault(key, []).append(layer)
    return [_together(group) if len(group) > 1 else group[0] for group in found.values()]


def _together(layers: Sequence[LayerChoices]) -> LayerChoices:
    first = layers[0]
    return replace(
        first,
        costs={label: sum(layer.costs[label] for layer in layers) for label in first.costs},
        weights=sum(layer.weights for layer in layers),
        inputs=sum(layer.inputs for layer in layers),
        together=tuple(layers),
    )


def _refuse_tied(layers: Sequence[LayerChoices]) -> None:
    for layer in layers:
        if layer.members:
            raise PlanError(
                f"{' and '.join(layer.members)} are one weight, and channel scales of their inputs would make"
                " two of it",
                hint="use mixdq, or keep these layers in floating point",
            )


def _joined(layers: Sequence[LayerChoices], shared: Mapping[str, str]) -> list[LayerChoices]:
    """Make one entry of a layer and its tied copies: they are stored once and take the same bits."""
    by_name = {layer.site.name: layer for layer in layers}
    members: dict[str, list[str]] = {}
    for layer in layers:
        first = shared.get(f"{layer.site.name}.weight", "").rpartition(".")[0]
        owner = first if first in by_name else layer.site.name
        members.setdefault(owner, []).append(layer.site.name)
    return [
        replace(by_name[owner], members=tuple(sorted(names, key=lambda name: name != owner)))
        if len(names) > 1
        else by_name[owner]
        for owner, names in members.items()
    ]
