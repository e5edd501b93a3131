"""What the stage `eep` tells of a search: hand-made, with figures that a reader can work out."""

from __future__ import annotations

from typing import Any

RULES = {"frequency": 40.0, "soft_activation": 50.0, "naee": 60.0}
KEPT = {"0": [0, 3], "1": [0, 3], "2": [1, 2]}


def history(first: int = 10, total: int = 20) -> list[dict[str, Any]]:
    """Return five random individuals, three given ones, and children that become better by a point each.

    The last of the choosing phase failed; every fourth child of the second phase has two parents.
    """
    rows, best = [], None
    fitness: float | None
    for index in range(total):
        row: dict[str, Any] = {"index": index, "phase": 1 if index < first else 2, "parents": []}
        if index < 5:
            kind, fitness = "random", 30.0 + 4 * (index % 3)
        elif index < 8:
            row["name"] = list(RULES)[index - 5]
            kind, fitness = "given", RULES[row["name"]]
        else:
            kind, fitness = "crossover" if index % 4 == 0 and index >= first else "mutation", 60.0 + index - 8
            fitness = None if index == first - 1 else fitness
        best = fitness if best is None else max(best, -1e9 if fitness is None else fitness)
        rows.append({**row, "fitness": fitness, "best": best, "kind": kind})
    return rows


def row(name: str, accuracy: float, error: float, train: float | None = None) -> dict[str, Any]:
    """Return what was measured of one contender on the test items."""
    found = {"accuracy": accuracy, "standard_error": error, "loss": 0.5, "items": 400}
    return {
        "name": name,
        "score": 100 * accuracy - 0.0005,
        **found,
        **({} if train is None else {"train": train}),
    }


def scores(merged: bool = True) -> list[dict[str, Any]]:
    """Return all rows; NAEE and what was chosen before merging are within two errors of the result."""
    chance = {"accuracy": 0.4, "deviation": 0.125, "score": 40.0, "score_deviation": 12.5}
    return [
        row("original", 1.0, 0.0, 99.5),
        {"name": "random", "draws": 30, "failed": 0, "items": 400, "train": 38.25, **chance},
        row("frequency", 0.45, 0.0249, 40.0),
        row("soft_activation", 0.55, 0.0249, 50.0),
        row("naee", 0.6, 0.0245, 60.0),
        *([row("eep: experts chosen", 0.64, 0.024, 62.0)] if merged else []),
        row("eep", 0.65, 0.0238, 71.0),
    ]


def given(**changes: Any) -> dict[str, Any]:
    """Return what is told of a choice that the recipe names: three layers, half of four experts."""
    counts = {"experts_before": 4, "experts_after": 2, "active_before": 2, "active_after": 2}
    return {**counts, "experts": {layer: list(kept) for layer, kept in KEPT.items()}, **changes}


def searched(**changes: Any) -> dict[str, Any]:
    """Return what is told of a search with 10 evaluations that choose and 10 that merge."""
    return {
        **given(),
        "groups": ["layers.0-1", "layers.2"],
        "merged": True,
        "seed": 7,
        "fitness": {"by": "exact_match", "task": None, "train": 128, "dev": 0, "test": 400},
        "scores": scores(),
        "search": {"evaluations": 20, "prune_evals": 10, "best": 19, "history": history()},
        **changes,
    }
