"""Other ways to spend the same bytes: what the program is held against in tests and benchmarks.

All take items with a cost in bytes and a limit, and return item -> label. Each spends what is left of
the budget as its own rule would, so that none loses for leaving bytes unused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...allocation import Budget, Item, allocate
from .offers import nominal_bits

_KEY = "bytes"


def evenly(items: Sequence[Item], limit_bytes: int) -> dict[str, str]:
    """Give every layer the same bits, the most that fit; what is left raises layers in their order.

    Args:
        items: in the order of the model; those with one choice keep it.
        limit_bytes: for all items together.
    """
    ladders = {item.name: _ladder(item) for item in items}
    most = max(len(ladder) for ladder in ladders.values())
    chosen = dict.fromkeys(ladders, 0)
    for step in range(most):
        raised = {name: min(step, len(ladder) - 1) for name, ladder in ladders.items()}
        if _spent(items, ladders, raised) > limit_bytes:
            break
        chosen = raised
    left = limit_bytes - _spent(items, ladders, chosen)
    costs = _costs(items)
    for name, ladder in ladders.items():
        if chosen[name] + 1 < len(ladder):
            extra = costs[name, ladder[chosen[name] + 1]] - costs[name, ladder[chosen[name]]]
            if extra <= left:
                chosen[name] += 1
                left -= extra
    return {name: ladder[chosen[name]] for name, ladder in ladders.items()}


def greedily(items: Sequence[Item], limit_bytes: int) -> dict[str, str]:
    """Raise, one step at a time, the layer that gains most per byte among the steps that fit."""
    ladders, costs = {item.name: _ladder(item) for item in items}, _costs(items)
    losses = {(item.name, choice.label): choice.loss for item in items for choice in item.choices}
    chosen = dict.fromkeys(ladders, 0)
    left = limit_bytes - _spent(items, ladders, chosen)
    while True:
        best: tuple[float, int, str] | None = None
        for place, (name, ladder) in enumerate(ladders.items()):
            if chosen[name] + 1 == len(ladder):
                continue
            now, then = (name, ladder[chosen[name]]), (name, ladder[chosen[name] + 1])
            extra = costs[then] - costs[now]
            if extra <= left:
                gain = (losses[now] - losses[then]) / max(extra, 1)
                best = max(best, (gain, -place, name)) if best else (gain, -place, name)
        if best is None:
            return {name: ladder[chosen[name]] for name, ladder in ladders.items()}
        name = best[2]
        left -= costs[name, ladders[name][chosen[name] + 1]] - costs[name, ladders[name][chosen[name]]]
        chosen[name] += 1


def at_random(items: Sequence[Item], limit_bytes: int, generator: random.Random) -> dict[str, str]:
    """Raise layers by one step in a random order until no step fits."""
    ladders, costs = {item.name: _ladder(item) for item in items}, _costs(items)
    chosen = dict.fromkeys(ladders, 0)
    left = limit_bytes - _spent(items, ladders, chosen)
    open_ = [name for name, ladder in ladders.items() if len(ladder) > 1]
    while open_:
        name = generator.choice(open_)
        ladder, now = ladders[name], chosen[name]
        extra = costs[name, ladder[now + 1]] - costs[name, ladder[now]]
        if extra <= left:
            left -= extra
            chosen[name] += 1
        if extra > left or chosen[name] + 1 == len(ladder):
            open_ = [
                other
                for other in open_
                if chosen[other] + 1 < len(ladders[other])
                and costs[other, ladders[other][chosen[other] + 1]]
                - costs[other, ladders[other][chosen[other]]]
                <= left
            ]
    return {name: ladder[chosen[name]] for name, ladder in ladders.items()}


def by_weight_error(
    items: Sequence[Item], errors: Mapping[str, Mapping[str, float]], limit_bytes: int
) -> dict[str, str]:
    """Minimise the sum of the weights' own relative errors, exactly, without looking at any output.

    Args:
        items: with costs; their losses do not matter.
        errors: item -> label -> |W - W^|^2 / |W|^2, times what a layer is to count.
        limit_bytes: for all items together.
    """
    blind = [
        replace(
            item,
            choices=tuple(
                replace(choice, loss=errors.get(item.name, {}).get(choice.label, 0.0))
                for choice in item.choices
            ),
        )
        for item in items
    ]
    return allocate(blind, [Budget(_KEY, limit_bytes)]).choices


def _ladder(item: Item) -> list[str]:
    """Return the labels that are worth climbing, fewest bits first; floating point is the last."""
    if len(item.choices) == 1:
        return [item.choices[0].label]
    return sorted((choice.label for choice in item.choices), key=nominal_bits)


def _costs(items: Sequence[Item]) -> dict[tuple[str, str], int]:
    return {(item.name, choice.label): choice.costs[_KEY] for item in items for choice in item.choices}


def _spent(items: Sequence[Item], ladders: Mapping[str, list[str]], chosen: Mapping[str, int]) -> int:
    costs = _costs(items)
    return sum(costs[name, ladder[chosen[name]]] for name, ladder in ladders.items())
