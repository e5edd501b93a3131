"""What a pruning stage tells: widths by class and layer, and the file that says what was removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...models.base import ModelSpec, OpenModel, flat_shapes
from ...recipes.pruning import IsomorphicSettings
from .classes import classes
from .competition import competition
from .groups import Group, Selection
from .heads import heads_of
from .target import Cost
from .widths import Widths

ATTACHMENT = "pruning.json"


def widths_after(groups: Sequence[Group], selection: Selection) -> Widths:
    """Return the sizes that a selection leaves.

    Args:
        groups: of the model before it.
        selection: counted in the same.
    """
    now = Widths.of(groups)
    channels, heads, head_dims = dict(now.channels), dict(now.heads), dict(now.head_dims)
    for name, kept in selection.kept.items():
        if name in channels:
            channels[name] = len(kept)
        else:
            heads[name] = len(selection.heads[name])
            head_dims[name] = len(kept) // heads[name]
    return Widths(channels, heads, head_dims)


def class_rows(
    groups: Sequence[Group],
    after: Widths,
    settings: IsomorphicSettings,
    histograms: Mapping[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return one row per class with its members.

    Args:
        groups: of the model before the stage.
        after: sizes after it.
        settings: of the stage.
        histograms: class -> how the scores of its channels spread.
    """
    kept = after.flat()
    return [
        {
            "name": name,
            "kind": members[0].kind,
            "channels": [sum(group.size for group in members), sum(kept[group.name] for group in members)],
            "members": [_member_row(group, after, kept[group.name]) for group in members],
            "histogram": histograms[name],
        }
        for name, members in classes(groups, settings.ranking).items()
    ]


def _member_row(group: Group, after: Widths, kept: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": group.name, "block": group.block, "before": group.size, "after": kept}
    if group.attention is None:
        return {**row, "heads": None, "head_dim": None}
    heads, head_dim = heads_of(group)
    return {
        **row,
        "heads": [heads, after.heads[group.name]],
        "head_dim": [head_dim, after.head_dims[group.name]],
    }


def effective_ratios(
    groups: Sequence[Group], after: Widths, settings: IsomorphicSettings
) -> dict[str, dict[str, Any]]:
    """Return, for every scope from which something was asked, its totals and the share that went.

    A share goes beyond what was asked by what rounding removes, or by what a target needs.
    """
    found = {}
    for scope in competition(groups, settings):
        counts = [after.size(member.group, scope.unit) for member in scope.members]
        found[scope.name if scope.unit != "head_dim" else f"{scope.name} head_dim"] = {
            "setting": scope.setting,
            "share": scope.share,
            "before": scope.initial,
            "exact": scope.total() if settings.target is None else None,
            "after": sum(counts),
            "removed": round(1.0 - sum(counts) / scope.initial, 6),
        }
    return found


def paper_pair(before: ModelSpec, model: OpenModel) -> list[int] | None:
    """Return multiply-accumulates as papers on pruning count them, before and after; None: none known."""
    first = before.family.paper_macs(before.config, shapes=flat_shapes(before.surgery))
    last = model.family.paper_macs(model.config, shapes=flat_shapes(model.surgery))
    return None if first is None or last is None else [first, last]


def selection_document(
    groups: Sequence[Group],
    selection: Selection,
    settings: IsomorphicSettings,
    *,
    seed: int,
    samples: int,
    calibration: str,
    cost: tuple[Cost, Cost],
) -> dict[str, Any]:
    """Return what `pruning.json` says: enough to see, and to repeat, what was removed."""
    after = widths_after(groups, selection)
    kept = after.flat()
    return {
        "format": "compress-pruning",
        "version": 1,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "calibration": {"key": calibration, "samples": samples},
        "macs": [cost[0].macs, cost[1].macs],
        "parameters": [cost[0].parameters, cost[1].parameters],
        "classes": {
            name: {
                "channels": [
                    sum(group.size for group in members),
                    sum(kept[group.name] for group in members),
                ],
                "layers": {group.name: [group.size, kept[group.name]] for group in members},
            }
            for name, members in classes(groups, settings.ranking).items()
        },
        "scopes": effective_ratios(groups, after, settings),
        "selection": selection.to_json(),
    }
