"""The card's account of slimming: widths, cost in both conventions, what every phase lost and won back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .card_subject import Subject
from .markdown import code, table
from .slimming_table import (
    Document,
    alignings,
    choice_told,
    cost_rows,
    phase_rows,
    slimmings,
    training_told,
    width_rows,
)

_NORMALIZERS = {
    "gaussian": "moved by their mean and divided by their deviation",
    "mean": "divided by their mean",
    "max": "divided by the largest",
    "sum": "divided by their sum",
    "min_max": "stretched to reach from 0 to 1",
}
_SUMMED = {
    "summed": "the size of weight times summed gradient",
    "per_image": "the sum over images of the size of weight times gradient",
}


def slimming(subject: Subject) -> Iterator[str]:
    """Yield the section on what was slimmed, or nothing where nothing was."""
    found = slimmings(subject.document)
    if not found:
        return
    yield from ("## How it was slimmed", "")
    for stage in found:
        yield from _stage(stage)
    yield from _compared(subject)


def _stage(stage: Document) -> Iterator[str]:
    details = stage["details"]
    yield f"By {code(stage['method'])} (SlimSAM, arXiv 2312.05284), which takes the share"
    yield f"{details['ratio']:g} of the channels out of the image encoder. Prompt encoder and mask decoder"
    yield "are the original's: nothing was removed from them, and they were not trained."
    yield from _order(details)
    yield from _ranked(details)
    yield from _kept(details)
    yield ""
    yield from table(("width", "layers", "before", "after", "kept"), width_rows(details))
    cells = ((what, f"{a:,}", f"{b:,}", f"{b / a:.1%}") for what, a, b in cost_rows(details))
    yield from table(("", "before", "after", "kept"), cells)
    yield "Attention products are Q K^T and the weighted sums of V. The paper's table leaves them out, and"
    yield "then more seems to be saved than is. Both ways leave out biases, norms, softmax and the products"
    yield from ("with tables of relative positions.", "")
    yield from _phases(details)


def _order(details: Document) -> Iterator[str]:
    if details["slimming"] == "one_step":
        yield "Residual stream, heads and feed-forward networks were pruned at once, and what was left was"
        yield "aligned with the original's output (a baseline: not the paper's order)."
        return
    yield "First the residual stream was pruned and aligned with the original, then the channels of heads"
    yield "and of feed-forward networks; each time"
    if details["features"]:
        yield "inner features were aligned, too, which the other part had left comparable."
    else:
        yield "outputs alone were aligned (a baseline: not the paper's loss)."


def _ranked(details: Document) -> Iterator[str]:
    score = _SUMMED.get(details["gradients"], details["gradients"])
    yield f"A channel was scored by {score} of the error between the encoder's output and the same with"
    yield f"noise (disturbed Taylor, deviation {details['sigma']:g}), on {details['score_images']:,} images."
    yield "No masks or labels enter the scores."
    if details["ranking"] == "global":
        way = _NORMALIZERS.get(details["normalizer"], details["normalizer"])
        yield "Channels of all layers competed, heads with heads and feed-forward with feed-forward; before"
        yield f"that, the scores of each layer were {way}."
    else:
        yield "Channels competed within their layer, so that all layers are equally wide."


def _kept(details: Document) -> Iterator[str]:
    if details["rel_pos"] == "slice":
        yield "Tables of relative positions keep the columns of the channels that stay;"
    else:
        yield "Tables of relative positions started again from zero, as in the official code;"
    if details["attn_scale"] == "preserve":
        yield "keys were scaled so that the softmax keeps its temperature."
    else:
        yield "the temperature of the softmax follows the size of the heads, as in the official code."
    if details.get("kept_file"):
        yield f"{code(details['kept_file'])} beside the weights lists the channels that stay."


def _phases(details: Mapping[str, Any]) -> Iterator[str]:
    rows, choice = list(phase_rows(details)), details["choice"]
    with_masks = any(miou is not None for _, _, miou in rows)
    header = ("after", "error of the encoder's output", *(("mIoU with true masks",) if with_masks else ()))
    cells = (
        (name, f"{error:.4g}", *((("" if miou is None else f"{miou:.4f}"),) if with_masks else ()))
        for name, error, miou in rows
    )
    yield from table(header, cells)
    yield "The error is the mean square of what the output differs by from the original's."
    yield f"{details['train_images']:,} images were trained on, without labels or masks. Of every aligning"
    yield f"those weights stayed that were best by {choice_told(choice)}, which were neither scored nor"
    yield "trained on. This table is of the same images, so it is a little too good; the figures further up"
    yield from ("are of images by which nothing was chosen.", "")
    for phase in alignings(details):
        yield f"- {phase['name']}: {training_told(phase)}."
    yield ""


def _compared(subject: Subject) -> Iterator[str]:
    """Say what speed is held against, and how folders whose layers differ are loaded."""
    if "speed" in subject.document["evaluation"]:
        yield f"Speed is held against {code(subject.source)}, which this was made from. Published speeds of"
        yield "slimmed encoders are mostly held against SAM-H, a far larger model."
        yield ""
    if any("import compress" in way for way in subject.export["loads_with"]):
        yield "Its layers have widths that no config of transformers can say, so it needs compress to be"
        yield "loaded. With `ranking: uniform` all layers are equally wide, and the stock class alone loads"
        yield "the result."
        yield ""
