"""The card's figures of a model that segments: how its masks agree, and on which images that was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .markdown import table


def mask_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return rows (what, original, this checkpoint) of the table of measured figures."""
    rows = []
    if "mask_agreement" in metrics:
        what = "masks held against the original's at random points, mean IoU"
        rows.append((what, "1", f"{metrics['mask_agreement']:.4f}"))
    if "miou" in metrics:
        before, after = f"{metrics['miou_original']:.4f}", f"{metrics['miou']:.4f}"
        rows.append(("masks held against true ones, a point each, mean IoU", before, after))
    return rows


def mask_notes(details: Mapping[str, Any]) -> Iterator[str]:
    """Yield on which images and points it was measured, and how well objects of each size were met.

    Args:
        details: the report's `evaluation.segmentation`.
    """
    fidelity, quality = details.get("fidelity"), details.get("quality")
    chosen = f"chosen with seed {details['seed']} from {details['held_out']:,}"
    yield (
        f"- Measured on images {chosen} that were neither calibrated nor trained on. IoU is the intersection"
        " over union of two masks; of the masks that a model offers for a point, the one counts that it rates"
        " best itself."
    )
    if fidelity:
        yield (
            f"- Agreement with the original: {fidelity['prompts']:,} random points in"
            f" {fidelity['samples']:,} images; {fidelity['good']:.1%} of the masks have an IoU of at least"
            f" {fidelity['good_iou']:g}."
        )
    if quality:
        yield f"- True masks: {quality['masks']:,} in {quality['samples']:,} images."
    if details.get("skipped"):
        yield f"- Files left out because they cannot be read: {details['skipped']:,}."
    copies = details.get("copies")
    if copies:
        yield f"- Copies of held-out images that were left out of calibration and training: {copies:,}."
    yield ""
    if quality and len(quality["sizes"]) > 1:
        cells = (
            (
                f"{row['size']}, {row['from_share']:.0%} to {row['to_share']:.0%} of the image",
                f"{row['masks']:,}",
                f"{row['original']:.4f}",
                f"{row['result']:.4f}",
            )
            for row in quality["sizes"]
        )
        yield from table(("objects", "masks", "mIoU of the original", "of this checkpoint"), cells)
