"""Which blocks stay, by a count and a rule; nothing here looks at weights or data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product
from math import comb, prod
from typing import Any

import torch

from ...calibration.seeds import generator_for
from ...errors import PlanError
from ...models.blocks import block_lists, checked, depths
from ...recipes.depth import DepthSettings, Places
from .block_groups import units_of

Kept = dict[str, tuple[int, ...]]
Unit = tuple[int, ...]


def asked_of(config: Mapping[str, Any], settings: DepthSettings) -> dict[str, int | float | Places]:
    """Return list of blocks -> what `keep` says of it; lists that stay whole are not there.

    Raises:
        PlanError: a list that the model has not, or a count for a model with several lists.
    """
    known = depths(config)
    if isinstance(settings.keep, dict):
        unknown = [name for name in settings.keep if name not in known]
        if unknown:
            raise PlanError(f"keep: the model has no {unknown[0]}", hint=f"it has: {', '.join(known)}")
        return dict(settings.keep)
    if len(known) > 1 and not isinstance(settings.keep, float):
        raise PlanError(
            f"keep: the model has {len(known)} lists of blocks, and one count is given",
            hint=f"write keep as a mapping with the keys {', '.join(known)}",
        )
    return dict.fromkeys(known, settings.keep)


def units_to_remove(config: Mapping[str, Any], settings: DepthSettings) -> dict[str, tuple[list[Unit], int]]:
    """Return list of blocks -> (what may go, how many of these go).

    Raises:
        PlanError: more than there is would stay, nothing would go, or the rest cannot be told in pairs.
    """
    known = depths(config)
    mirrored = {blocks.name: blocks.mirrored for blocks in block_lists(config["_class_name"])}
    found = {}
    for name, asked in asked_of(config, settings).items():
        assert not isinstance(asked, tuple)  # refused by the settings: places are for `indices`
        depth = known[name]
        left = asked if isinstance(asked, int) else max(1, round(asked * depth))
        units = units_of(depth, mirrored[name], name)
        size = 2 if mirrored[name] else 1
        gone = depth - left
        if gone < 0:
            raise PlanError(f"keep: {left} blocks of {name} are asked for, and the model has {depth}")
        if gone % size or gone // size > len(units):
            raise PlanError(
                f"keep: {left} of the {depth} blocks of {name} cannot stay: they go in pairs, and the middle"
                " two stay",
                hint="ask for an even number of at least 2",
            )
        found[name] = (units, gone // size)
    if not any(gone for _, gone in found.values()):
        raise PlanError("keep: every block stays, so nothing would be removed", hint="ask for fewer")
    return found


def without(config: Mapping[str, Any], removed: Mapping[str, Collection[Unit]]) -> Kept:
    """Return what stays of lists from which units go.

    Raises:
        PlanError: such a model cannot be left.
    """
    known = depths(config)
    gone = {name: {place for unit in units for place in unit} for name, units in removed.items()}
    kept = {name: tuple(p for p in range(known[name]) if p not in places) for name, places in gone.items()}
    checked(config, kept)
    return kept


def _free(name: str, units: Sequence[Unit], pinned: Collection[tuple[str, int]]) -> list[Unit]:
    """Return the units of a list in which no block has to stay."""
    return [unit for unit in units if not any((name, place) in pinned for place in unit)]


def lowest(
    config: Mapping[str, Any],
    settings: DepthSettings,
    scores: Mapping[str, Sequence[float]],
    pinned: Collection[tuple[str, int]],
) -> Kept:
    """Return what stays when the units with the least scores go; of equal ones the last.

    Args:
        config: of the model.
        settings: of the stage.
        scores: list of blocks -> a number per block; of a pair the sum counts.
        pinned: (list, place) of blocks that stay whatever their score is.

    Raises:
        PlanError: too few blocks may go.
    """
    removed = {}
    for name, (units, gone) in units_to_remove(config, settings).items():
        free = _free(name, units, pinned)
        if gone > len(free):
            raise PlanError(
                f"keep: {gone} of {name} would have to go, and {len(units) - len(free)} of {len(units)}"
                " must stay"
            )
        ranked = sorted(free, key=lambda unit: (sum(scores[name][place] for place in unit), -unit[0]))
        removed[name] = ranked[:gone]
    return without(config, removed)


def oracle(config: Mapping[str, Any], settings: DepthSettings) -> Kept:
    """Return every first block of the pairs in the first half of a model, every second one in the second.

    By hand, as in BK-SDM (arXiv 2305.15798): of 28 blocks 0, 2, ..., 12, 15, 17, ..., 27 stay.

    Raises:
        PlanError: not half of an even depth is asked for, or blocks go in pairs of another kind.
    """
    removed: dict[str, list[Unit]] = {}
    for name, (units, gone) in units_to_remove(config, settings).items():
        if len(units) != 2 * gone or any(len(unit) > 1 for unit in units):
            raise PlanError(
                f"by: oracle keeps half of an even number of blocks; {len(units) - gone} of the {len(units)}"
                f" of {name} are asked for",
                hint="write keep: 0.5, or another rule",
            )
        removed[name] = [units[2 * pair + 1] if 2 * pair < gone else units[2 * pair] for pair in range(gone)]
    return without(config, removed)


def indices(config: Mapping[str, Any], settings: DepthSettings) -> Kept:
    """Return the places that `keep` lists.

    Raises:
        PlanError: such a model cannot be left.
    """
    given = {name: places for name, places in asked_of(config, settings).items() if isinstance(places, tuple)}
    chosen = checked(config, given)
    return {name: chosen[name] for name in given}


def possible(config: Mapping[str, Any], settings: DepthSettings, pinned: Collection[tuple[str, int]]) -> int:
    """Return how many choices there are that keep the pinned blocks.

    Args:
        config: of the model.
        settings: of the stage.
        pinned: (list, place) of blocks that stay.
    """
    asked = units_to_remove(config, settings)
    return prod(comb(len(_free(name, units, pinned)), gone) for name, (units, gone) in asked.items())


def _all_choices(
    config: Mapping[str, Any], settings: DepthSettings, pinned: Collection[tuple[str, int]]
) -> list[Kept]:
    asked = units_to_remove(config, settings)
    ways = [combinations(_free(name, units, pinned), gone) for name, (units, gone) in asked.items()]
    return [without(config, dict(zip(asked, removed, strict=True))) for removed in product(*ways)]


def draws(
    config: Mapping[str, Any], settings: DepthSettings, seed: int, pinned: Collection[tuple[str, int]]
) -> list[Kept]:
    """Return random choices, each of which removes as many blocks as are asked for.

    There are `settings.draws`, of which some may be equal. Where there are no more choices than that, all
    of them are returned, once each.

    Args:
        config: of the model.
        settings: of the stage.
        seed: of the run.
        pinned: (list, place) of blocks that stay in all of them.

    Raises:
        PlanError: too few blocks may go.
    """
    if 0 < possible(config, settings, pinned) <= settings.draws:
        return _all_choices(config, settings, pinned)
    generator = generator_for(seed, "depth", "random")
    found = []
    for _ in range(settings.draws):
        scores = {
            name: torch.rand(depth, generator=generator, dtype=torch.float64).tolist()
            for name, depth in depths(config).items()
        }
        found.append(lowest(config, settings, scores, pinned))
    return found
