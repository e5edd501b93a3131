"""From measured sensitivities to integer programs: items, losses, costs and budgets.

Weights and activations are programs of their own, as in MixDQ (arXiv 2405.17873). Two objectives:

- `power`: least sum of losses. A layer measured by SQNR loses 10^(-SQNR/10), the power of its error
  relative to the output's, one measured by SSIM loses 1 - SSIM. Losses of different metrics do not add
  up: several groups share one program, each divided by what it loses with every layer at its fewest
  bits, and weighted by a share that is swept.
- `mixdq`: the paper's. Largest sum of decibels, or of similarities; written as a loss, best - value. A
  sum of decibels rewards raising 40 dB to 60 as much as raising 5 to 25, so it is kept for fidelity only.

Floating point loses nothing, and its similarity is 1. Its decibels would be infinite, and the paper does
not offer it. Ours is that it counts as a grid of 16 bits, 6.02 dB above the best measured ones for every
further bit: no layer's best grid is as good as floating point.

More bits do not hurt: where a measurement says so, the better value of fewer bits is used
(`allocation_forms.make_monotone`) and the change is logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from ....calibration.sensitivity_table import Kind, Row, Table
from ....errors import StageError
from ....recipes.allocation import FLOAT_BITS, BudgetSettings
from ...allocation_forms import LossChange, make_monotone, mean_bits_band
from ...allocation_problem import Budget, Choice, Item
from .offers import label_of_activation, nominal_bits

if TYPE_CHECKING:
    from .candidates import LayerChoices

Objective = Literal["power", "mixdq"]
REST = "all other tensors"
"""Name of the item that stands for everything that is not allocated; no layer has spaces in its name."""

_DECIBELS_PER_BIT = 20 * math.log10(2)

_BITS, _BYTES, _ELEMENTS, _ORDER = "bits", "bytes", "elements", "nominal bits"


@dataclass(frozen=True)
class Assignment:
    """Bits for every layer.

    Attributes:
        weights: layer -> label of its weight's bits, "w4"; "w16" is floating point.
        activations: layer -> bits of its input; 16 is floating point.
    """

    weights: Mapping[str, str]
    activations: Mapping[str, int]


@dataclass(frozen=True)
class Program:
    """Layers with their choices, and what they lose.

    Attributes:
        items: one per entry, losses in the unit of its group; costs `bits` (of those with a choice) and
            `bytes`, or `elements` for activations.
        changes: measured losses that were not monotone.
        groups: those that have a layer with a choice -> what they are measured by; by SSIM first.
    """

    items: tuple[Item, ...]
    changes: tuple[LossChange, ...]
    groups: Mapping[str, str]

    def weighted(self, shares: Mapping[str, float]) -> list[Item]:
        """Return the items with losses that can be added up over the groups.

        One group keeps its losses. Of several, each loses its share with all of its layers at the
        fewest bits.

        Args:
            shares: group -> weight, not negative.
        """
        if len(self.groups) <= 1:
            return list(self.items)
        worst = {
            group: math.fsum(
                max(choice.loss for choice in item.choices) for item in self.items if item.group == group
            )
            for group in self.groups
        }
        factor = {group: shares[group] / worst[group] if worst[group] > 0 else 1.0 for group in self.groups}
        return [
            replace(
                item,
                choices=tuple(
                    replace(choice, loss=choice.loss * factor.get(item.group or "", 1.0))
                    for choice in item.choices
                ),
            )
            for item in self.items
        ]


def size_of(item: Item) -> int:
    """Return the number of weights, or of elements of the input, that an item's bits are spent on."""
    costs = item.choices[0].costs
    return costs.get(_BITS, costs.get(_ELEMENTS, 0)) // costs[_ORDER]


def has_choice(entry: LayerChoices) -> bool:
    """Tell whether the weight's bits are to be chosen."""
    return len(entry.costs) > 1


def allocated_weights(choices: Sequence[LayerChoices]) -> int:
    """Return the number of weights of the layers that have a choice, copies once."""
    return sum(entry.weights for entry in choices if has_choice(entry))


def weight_program(choices: Sequence[LayerChoices], table: Table, objective: Objective) -> Program:
    """Return the program of the weights.

    Raises:
        StageError: a sensitivity is missing or not finite; the layer is named.
    """
    items = []
    for entry in choices:
        labels = sorted(entry.costs, key=nominal_bits)
        losses = _losses(entry, labels, "weight", table, objective)
        items.append(_weight_item(entry, losses))
    return _program(choices, items, table)


def nominal_program(choices: Sequence[LayerChoices]) -> Program:
    """Return the program of the weights as it is guessed before anything is measured.

    Every bit divides the power of a weight's error by four, and all weights count alike.
    """
    items = [
        _weight_item(entry, {label: entry.weights * _guess(label) for label in entry.costs})
        for entry in choices
    ]
    return _program(choices, items, None)


def _guess(label: str) -> float:
    bits = nominal_bits(label)
    return 0.0 if bits == FLOAT_BITS else 4.0**-bits


def _weight_item(entry: LayerChoices, losses: Mapping[str, float]) -> Item:
    counted = entry.weights if has_choice(entry) else 0
    made = tuple(
        Choice(
            label,
            losses[label],
            {
                _BYTES: entry.costs[label],
                _BITS: nominal_bits(label) * counted,
                _ORDER: nominal_bits(label),
            },
        )
        for label in sorted(entry.costs, key=nominal_bits)
    )
    return Item(entry.site.name, made, entry.metric_group, entry.names)


def activation_program(choices: Sequence[LayerChoices], table: Table, objective: Objective) -> Program:
    """Return the program of the activations, whose cost is bits times elements of a layer's input.

    Args:
        choices: of the layers whose inputs are quantized: not those in floating point.
        table: with rows for every offered number of bits but 16.
        objective: of the losses.

    Raises:
        StageError: a sensitivity is missing or not finite, or how large an input is; the layer is named.
    """
    items = []
    for entry in choices:
        offered = {label_of_activation(bits): bits for bits in sorted(entry.activations)}
        if len(offered) > 1 and not entry.inputs:
            raise StageError(f"{entry.site.name}: how many elements its input has is not known")
        losses = _losses(entry, list(offered), "activation", table, objective)
        made = tuple(
            Choice(label, losses[label], {_ELEMENTS: bits * entry.inputs, _ORDER: bits})
            for label, bits in offered.items()
        )
        items.append(Item(entry.site.name, made, entry.metric_group, entry.names))
    return _program(choices, items, table)


def _program(choices: Sequence[LayerChoices], items: Sequence[Item], table: Table | None) -> Program:
    monotone, changes = make_monotone(items, _ORDER)
    metrics: dict[str, str] = {}
    for entry, item in zip(choices, items, strict=True):
        if len(item.choices) > 1 and entry.metric_group not in metrics:
            metrics[entry.metric_group] = _metric_of(entry.site.name, table)
    ordered = sorted(metrics.items(), key=lambda pair: pair[1] != "ssim")
    return Program(tuple(monotone), tuple(changes), dict(ordered))


def _metric_of(layer: str, table: Table | None) -> str:
    rows = table.rows if table else ()
    return next((row.metric for row in rows if row.layer == layer), "none")


def _losses(
    entry: LayerChoices, labels: Sequence[str], kind: Kind, table: Table, objective: Objective
) -> dict[str, float]:
    """Return the losses of an entry's labels; a layer without a choice loses nothing that matters."""
    if len(labels) == 1:
        return {labels[0]: 0.0}
    rows = {}
    for label in labels:
        if nominal_bits(label) == FLOAT_BITS:
            continue
        row = table.at(kind, entry.site.name, label)
        if row is None:
            raise StageError(
                f"{entry.site.name}: its sensitivity at {label} was not measured",
                hint="measure again, with these bits among those offered",
            )
        if not (math.isfinite(row.loss) and math.isfinite(row.value)):
            raise StageError(
                f"{entry.site.name}: its sensitivity at {label} is {row.value} (loss {row.loss})",
                hint="measure this layer again",
            )
        rows[label] = row
    if objective == "power":
        return {label: rows[label].loss if label in rows else 0.0 for label in labels}
    values = {
        label: rows[label].value if label in rows else _value_in_floating_point(rows) for label in labels
    }
    best = max(values.values())
    return {label: best - value for label, value in values.items()}


def _value_in_floating_point(rows: Mapping[str, Row]) -> float:
    """Return what floating point counts as under the paper's objective; see the module's docstring."""
    most = max(rows.values(), key=lambda row: row.bits)
    if most.metric == "ssim":
        return 1.0
    best = max(row.value for row in rows.values())
    return best + _DECIBELS_PER_BIT * (FLOAT_BITS - most.bits)


def rest_item(fixed_bytes: int) -> Item:
    """Return the item of everything that is not allocated, so that budgets are about the whole model."""
    return Item(REST, (Choice("as it is", 0.0, {_BYTES: fixed_bytes, _BITS: 0, _ELEMENTS: 0}),))


def weight_budgets(
    choices: Sequence[LayerChoices], settings: BudgetSettings, original_bytes: int
) -> list[Budget]:
    """Return the budgets of the weights; bytes are those of all tensors of the model.

    Args:
        choices: of all layers.
        settings: what was asked.
        original_bytes: of all tensors of the model before the stage.
    """
    budgets = []
    if settings.mean_bits is not None:
        _, limit = mean_bits_band(settings.mean_bits, allocated_weights(choices), half_width=0)
        budgets.append(Budget("mean_bits", limit, cost=_BITS, unit="bits"))
    if settings.bytes is not None:
        budgets.append(Budget("bytes", settings.bytes, cost=_BYTES))
    if settings.ratio is not None:
        limit = math.floor(Fraction(str(settings.ratio)) * original_bytes)
        budgets.append(Budget("ratio", limit, cost=_BYTES))
    return budgets


def spent(
    budget: Budget, choices: Sequence[LayerChoices], weights: Mapping[str, str], fixed_bytes: int
) -> int:
    """Return what an assignment takes of a budget, in its unit: bits, or bytes of all tensors."""
    if budget.key == _BYTES:
        return fixed_bytes + stored_bytes(choices, weights)
    return sum(
        nominal_bits(weights[entry.site.name]) * entry.weights for entry in choices if has_choice(entry)
    )


def bytes_budget(limit_bytes: int) -> Budget:
    """Return a budget for all tensors of the model."""
    return Budget("bytes", limit_bytes, cost=_BYTES)


def activation_budget(choices: Sequence[LayerChoices], mean_bits: float) -> Budget:
    """Return the budget of the activations: average bits of these layers' inputs by their elements."""
    elements = sum(entry.inputs for entry in choices)
    _, limit = mean_bits_band(mean_bits, elements, half_width=0)
    return Budget("mean_bits", limit, cost=_ELEMENTS, unit="bits")


def spread(choices: Sequence[LayerChoices], labels: Mapping[str, str]) -> dict[str, str]:
    """Return the label of every layer, tied copies included, from those of the items."""
    return {name: labels[entry.site.name] for entry in choices for name in entry.names}


def stored_bytes(choices: Sequence[LayerChoices], weights: Mapping[str, str]) -> int:
    """Return the bytes that the allocated layers take under an assignment."""
    return sum(entry.costs[weights[entry.site.name]] for entry in choices)


def mean_bits(choices: Sequence[LayerChoices], weights: Mapping[str, str]) -> float:
    """Return the average nominal bits of the layers that have a choice, weighted by their weights."""
    counted = [entry for entry in choices if has_choice(entry)]
    total = sum(entry.weights for entry in counted)
    bits = sum(nominal_bits(weights[entry.site.name]) * entry.weights for entry in counted)
    return bits / total if total else 0.0
