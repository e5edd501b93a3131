"""What pruning and recovery tell in a report, in the pieces that card and pictures share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.registry import task_of
from ..recipes.recovery import MaskedDistillSettings
from ..recipes.stages import STAGES

Document = Mapping[str, Any]

KINDS = {"width": "residual stream", "ff": "feed-forward", "attention": "attention"}
WIDTHS = ("residual stream", "feed-forward", "heads", "head channels")
"""What can become narrower, in the order of pictures and tables."""


@dataclass(frozen=True)
class Layer:
    """One width of one layer.

    Attributes:
        label: short: the block, or the place among those of its kind; of a single one "all".
        before, after: channels, or heads.
    """

    label: str
    before: int
    after: int


def prunings(document: Document) -> list[Document]:
    """Return the stages that removed channels, in order."""
    return [stage for stage in document.get("stages", ()) if (stage.get("details") or {}).get("classes")]


def recoveries(document: Document) -> list[Document]:
    """Return the stages that trained, in order."""
    return [stage for stage in document.get("stages", ()) if _trained(stage.get("details") or {})]


def _trained(details: Document) -> bool:
    return bool(details.get("steps")) and isinstance(details.get("loss"), list | tuple)


def trained_on(details: Document) -> str:
    """Return what a training saw, as the end of a sentence; empty where it does not say."""
    for key, what in (("images", "images"), ("data", "latents")):
        if isinstance(details.get(key), int):
            return f" on {details[key]:,} {what}"
    return ""


def recovery_advice(methods: Sequence[str], family: str) -> str | None:
    """Say of a recipe that nothing trains the model after it is pruned; None where something does.

    Args:
        methods: of the stages, in order.
        family: of the model.
    """
    known = [STAGES.get(method) for method in methods]
    phases = [one.phase if one is not None and (one.hurts or one.phase != "prune") else None for one in known]
    if "prune" not in phases or "recover" in phases[len(phases) - phases[::-1].index("prune") :]:
        return None
    required = "fine-tuning required: no stage trains the model after it is pruned"
    if task_of(family) == "classify":
        return f"{required}, and pruned models answer badly; the stage for it is finetune"
    if family in MaskedDistillSettings.families:
        return f"{required}, and pruned denoisers draw badly; the stage for it is distill"
    return f"{required}; no stage here trains models such as {family}, so this takes other tools"


def steps_of(details: Document) -> int:
    """Return in how many steps a pruning stage removed; scores are told of the last."""
    return max(1, len(details.get("schedule") or ()))


def numbered(name: str, number: int) -> str:
    """Return the file name of the picture of the first, second, ... stage of a kind."""
    stem, dot, ending = name.partition(".")
    return name if number == 1 else f"{stem}_{number}{dot}{ending}"


def change(loss: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the loss of a training at its start and its end, each the mean of a twelfth of the values."""
    values = [value for _, value in loss]
    count = max(1, len(values) // 12)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def span(widths: Sequence[int]) -> str:
    """Return equal widths as one number, others as the least and the largest."""
    return f"{widths[0]:,}" if len(set(widths)) == 1 else f"{min(widths):,} to {max(widths):,}"


def shown_class(entry: Document) -> str:
    """Return a class as people read it: its kind, and its number or name where there are several."""
    kind, name = KINDS.get(entry["kind"], str(entry["kind"])), str(entry["name"])
    if name == entry["kind"]:
        return kind
    number = name.removeprefix(f"{entry['kind']}.")
    return f"{kind} {number}" if number.isdecimal() else f"{kind}: {name}"


def widths_of(details: Document) -> list[str]:
    """Return which of `WIDTHS` changed anywhere in a pruning stage."""
    return [kind for kind in WIDTHS if any(layer.before != layer.after for layer in layers_of(details, kind))]


def layers_of(details: Document, kind: str) -> list[Layer]:
    """Return all layers that have a width of this kind, in the order of the model.

    Args:
        details: of a pruning stage.
        kind: one of `WIDTHS`.
    """
    found: list[tuple[Document, int, int]] = []
    for member in (member for entry in details["classes"] for member in entry["members"]):
        pair = _pair(member, kind)
        if pair is not None:
            found.append((member, *pair))
    found.sort(key=lambda item: -1 if item[0]["block"] is None else item[0]["block"])
    blocks = [member["block"] for member, _, _ in found]
    if blocks == [None]:
        return [Layer("all", *found[0][1:])]
    distinct = None not in blocks and len(set(blocks)) == len(blocks)
    return [
        Layer(str(member["block"] if distinct else place), before, after)
        for place, (member, before, after) in enumerate(found)
    ]


def _pair(member: Document, kind: str) -> Sequence[int] | None:
    """Return a member's width of a kind, before and after; None where it has none of the kind."""
    # By the member, not by its class: those of a global ranking may hold several kinds.
    own = "attention" if member.get("heads") else "width" if member["block"] is None else "ff"
    if own == "attention":
        found: Mapping[str, Sequence[int]] = {"heads": member["heads"], "head channels": member["head_dim"]}
        return found.get(kind)
    shown = "residual stream" if own == "width" else "feed-forward"
    return (member["before"], member["after"]) if kind == shown else None
