"""The card's layers: what each is stored in, what the format changed, and what none of it speeds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..runtime.moe_classes import is_moe_class
from ..runtime.moe_names import expert_linear
from .card_subject import Subject
from .depth_table import removals
from .experts_table import expert_stages, removes
from .formats import OF_LANGUAGE_MODELS
from .fresh_process import NOT_EXECUTED
from .kv_table import kv_stages
from .layer_table import grouped, has_quantizer
from .markdown import code, sentence, table
from .pruning_table import prunings
from .slimming_table import slimmings


def export_notes(subject: Subject) -> Iterator[str]:
    """Yield the section of what the format could not carry over, or nothing."""
    export = subject.export
    notes = [note for note in export.get("notes", ()) if note not in NOT_EXECUTED.values()]
    if notes:
        yield "## Notes on the export" if export["format"] == "compress" else "## What the format changes"
        yield ""
        yield from (f"- {sentence(note)}" for note in notes)
        yield ""


def layers(subject: Subject) -> Iterator[str]:
    """Yield the table of layers, or nothing where they were not counted."""
    if not subject.linears:
        return
    yield from ("## Layers", "")
    rows = [
        (code(pattern), weight, activation, scale, count, f"{size:,}" if size else "0 (a stored copy)", why)
        for pattern, weight, activation, scale, count, size, why in grouped(subject.linears)
    ]
    header = ("linear layers", "weight bits", "activation bits", "scale per", "layers", "bytes", "decided by")
    yield from table(header, rows)
    format_ = subject.export["format"]
    if format_ == "sdnq":
        yield "Bytes as `compress` would pack them; the format `sdnq` stores scales in its own way, see the"
        yield "size of the file above."
    else:
        rest = subject.metrics["bytes"] - sum(row["bytes"] for row in subject.linears)
        listed = any(expert_linear(row["name"]) for row in subject.linears)
        fused = is_moe_class(subject.model["class"]) and not listed
        others = "tensors, experts among them," if fused else "tensors"
        yield f"Bytes count weights, scales, zero points and biases; all other {others} together have"
        yield f"{rest:,}. Copies, which some formats store as well, are counted once."
    yield ""


def limits(subject: Subject) -> Iterator[str]:
    """Yield the section of what is no faster than before."""
    linears = [row for row in subject.linears if row["method"]]
    yield from ("## What it does not speed up", "")
    if subject.export["format"] == "dequantized" and has_quantizer(subject.document):
        pruned = prunings(subject.document) or removals(subject.document)
        than = "the pruned model before" if pruned else "the original"
        yield "- This format stores the rounded weights in floating point: neither smaller nor faster than"
        yield f"  {than}, and activations are not quantized."
    yield from _products(subject, linears)
    if prunings(subject.document):
        yield "- Narrower layers have fewer multiply-accumulates, by the share stated above. Time falls less"
        yield "  where a layer was small already, or its width is no multiple of what the processor works in."
    slimmed = bool(slimmings(subject.document))
    if slimmed:
        yield "- Layers that attend to the whole image are narrower, but compare as many tokens: their"
        yield "  softmax takes the time that it took. Prompt encoder and mask decoder are unchanged."
    if removals(subject.document):
        yield "- Fewer blocks have fewer multiply-accumulates, by the share stated above. What lies before"
        yield "  and after the blocks takes its time as it did."
    yield from _experts(expert_stages(subject.document))
    if kv_stages(subject.document):
        yield "- A compressed cache adds work to decoding: keys and values are rebuilt for every token; the"
        yield "  section on it counts how much."
    products = "- Attention products, softmax, normalisation and the layers listed as floating point run"
    if linears and prunings(subject.document):
        yield from (products, "  in floating point.")
    elif not prunings(subject.document) and not slimmed:
        yield from (f"{products} as in the", "  original.")
    yield from _speed(subject)
    yield ""


def _products(subject: Subject, linears: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what becomes of the products of quantized layers."""
    format_ = subject.export["format"]
    if format_ == "compressed-tensors":
        yield "- transformers unpacks the weights into floating point: the file is smaller, but there neither"
        yield "  the memory nor the time of a product is; rounded inputs are floating point, too."
    elif format_ == "bitsandbytes-nf4":
        yield "- The package turns weights into floating point for every product: the file and the memory are"
        yield "  smaller, the product is no faster."
    if format_ in OF_LANGUAGE_MODELS:
        return
    if any(row["weight_bits"] < 8 for row in linears):
        yield (
            "- Weights below 8 bits make the file smaller; the product itself runs on 8-bit integers and is"
            " no faster than with 8-bit weights."
        )
    if any(row["activation_bits"] is None for row in linears):
        yield "- Quantized layers without activation bits are weight-only: their product is floating point."


def _experts(stages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not stages:
        return
    first, last = stages[0]["details"]["active_before"], stages[-1]["details"]["active_after"]
    if first != last:
        yield f"- A token meets {last} instead of {first} experts; everything else takes its time as it did."
    elif any(removes(stage["details"]) for stage in stages):
        yield "- Fewer experts take less memory; a token meets as many of them as before, so its products are"
        yield "  as many."


def _speed(subject: Subject) -> Iterator[str]:
    found = subject.document["evaluation"].get("speed")
    if found is None:
        yield "- No speed was measured in this run; small widths and small batches gain little or lose."
        return
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    yield f"- The times above are those of {found['on']}, {threads}, original and checkpoint in turn."
    yield "  Other machines and other batches gain more or less; small widths gain little or lose."
