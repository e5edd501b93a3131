"""The card's account of an allocation: what was asked, what was used, and how good it is known to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .card_subject import Subject
from .layer_table import allocation_of
from .markdown import table

_METRICS = {"sqnr_db": "SQNR", "ssim": "SSIM", "none": "nothing"}


def allocation(subject: Subject) -> Iterator[str]:
    """Yield the section on how bits were chosen, or nothing where all layers were given theirs."""
    found = allocation_of(subject.document)
    if found is None:
        return
    yield from ("## How the bits were chosen", "")
    yield f"By an integer program over all layers; objective: {found['objective_label']}. The losses are"
    yield "measured, one layer at a time; the answers were then measured together, and the best one taken."
    yield ""
    yield from table(("", "asked", "used"), _uses(found))
    yield from _proof(found)
    yield ""
    header = ("group", "measured by", "layers", "weights", "mean bits", "layers at each number of bits")
    yield from table(header, _groups(found["groups"]))
    yield from _activations(found.get("activations"))


def _uses(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    asked, used = found["asked"], found["used"]
    limit = used["bytes_limit"]
    shown = "" if limit is None else f"{limit:,}"
    if "ratio" in asked:
        shown += f" ({asked['ratio']:g} of the original)"
    yield ("bytes of all tensors", shown, f"{used['bytes']:,}")
    mean = f"{asked['mean_bits']:g}" if "mean_bits" in asked else ""
    yield ("mean bits of the allocated weights, scales not counted", mean, f"{used['mean_bits']:.4f}")
    yield ("the same with scales and biases, as stored", "", f"{used['mean_bits_stored']:.4f}")


def _proof(found: Mapping[str, Any]) -> Iterator[str]:
    bound, measured = found["bound"], found["measured"]
    proven = "which proves it optimal" if bound["stopped"] == "optimal" else "found by " + bound["found_by"]
    taken = f"Taken: {bound['point']}"
    if found["chosen"] != bound["point"]:
        taken = f"Taken: {found['chosen']}, which measured better than the program's best, {bound['point']}"
    yield (
        f"- {100 * found['used']['share']:.2f} % of the budget is used. {taken}; loss"
        f" {bound['loss']:.6g}, lower bound {bound['lower_bound']:.6g} ({bound['certificate']}), gap"
        f" {bound['gap_of_range']:.1e} of the range, {proven}."
    )
    predicted = measured["predicted_weights_sqnr_db"]
    sum_ = "" if predicted is None else f" (the sum of the layers' losses predicts {predicted:.2f} dB)"
    yield (
        f"- Measured on calls that no sensitivity was measured on: {measured['weights_sqnr_db']:.2f} dB with"
        f" quantized weights{sum_}, {measured['sqnr_db']:.2f} dB with activations as well."
    )


def _groups(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    for group in groups:
        histogram = ", ".join(f"{count} at {bits}" for bits, count in group["histogram"].items())
        metric = _METRICS.get(group["metric"], group["metric"])
        mean = f"{group['mean_bits']:.3f}"
        yield (group["name"], metric, group["layers"], f"{group['weights']:,}", mean, histogram)


def _activations(found: Mapping[str, Any] | None) -> Iterator[str]:
    if not found:
        return
    if found["rule"] == "protect":
        count = len(found["protected"])
        yield f"The inputs of {count} layers stay in floating point: those that lose most, a share of"
        yield f"{found['share_asked']:g} by count."
    else:
        yield f"The inputs have {found['mean_bits']:.3f} bits on average, weighted by their elements"
        yield f"({found['mean_bits_asked']:g} asked)."
    yield ""
