"""What intersections over union say together; no models, no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

GOOD_IOU = 0.9
_WORST_SHOWN = 5
SIZES = (("small", 0.0, 0.01), ("medium", 0.01, 0.1), ("large", 0.1, 1.0))
"""What an object is called -> the shares of its image that it covers: from the first, below the second."""


def mean(values: Tensor) -> float:
    """Return the mean of [n] values, five digits."""
    return round(float(values.double().mean()), 5)


def agreement_details(names: Sequence[str], overlaps: Sequence[Tensor]) -> dict[str, Any]:
    """Return how the masks of two models agree, and where they do least.

    Args:
        names: of the images.
        overlaps: of each image the intersections over union at its points, [points] float32.

    Returns:
        ``prompts``, ``good`` (share of them with at least `GOOD_IOU`), and ``worst``: up to five images with
        the lowest means, each ``image``, ``mean``, ``lowest``.
    """
    every = torch.cat(list(overlaps))
    order = sorted(range(len(names)), key=lambda index: (float(overlaps[index].mean()), index))
    return {
        "prompts": len(every),
        "good_iou": GOOD_IOU,
        "good": mean((every >= GOOD_IOU).float()),
        "worst": [
            {
                "image": names[index],
                "mean": mean(overlaps[index]),
                "lowest": round(float(overlaps[index].min()), 5),
            }
            for index in order[:_WORST_SHOWN]
        ],
    }


def size_rows(shares: Tensor, original: Tensor, result: Tensor) -> list[dict[str, Any]]:
    """Return a row for each of `SIZES` that occurs: objects, and mIoU of the original and of the result.

    Args:
        shares: [n] float, which share of its image each true mask covers.
        original: [n] float32, intersection over union of the original's masks with the true ones.
        result: [n] float32, the same of what was made of it.
    """
    rows = []
    for size, least, below in SIZES:
        of_size = (shares >= least) & ((shares < below) | (below == 1.0))
        if bool(of_size.any()):
            rows.append(
                {
                    "size": size,
                    "from_share": least,
                    "to_share": below,
                    "masks": int(of_size.sum()),
                    "original": mean(original[of_size]),
                    "result": mean(result[of_size]),
                }
            )
    return rows
