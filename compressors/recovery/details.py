"""What a training tells the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .loop import Trained

MAX_POINTS = 200


def training_details(trained: Trained) -> dict[str, Any]:
    """Return JSON values: `steps`, `loss`, `lr`, and `seconds`, which differ between equal runs.

    `loss` and `lr` are pairs of a step, counted from 1, and a number: of a loss the mean over the steps since
    the pair before.
    """
    ends = _ends(len(trained.losses))
    starts = [0, *ends[:-1]]
    return {
        "steps": len(trained.losses),
        "loss": [
            [end, _rounded(sum(trained.losses[start:end]) / (end - start))]
            for start, end in zip(starts, ends, strict=True)
        ],
        "lr": [[end, _rounded(trained.rates[end - 1])] for end in ends],
        "seconds": {"per_step": round(trained.seconds_per_step, 4)},
    }


def _ends(steps: int) -> Sequence[int]:
    points = min(steps, MAX_POINTS)
    return [steps * (index + 1) // points for index in range(points)]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
