"""The model card: what the folder holds, how to load it, what it costs, how it was made.

Here stands the order of the sections; each has a module of its own, `card_*.py`. Everything comes from
the report; nothing differs between two runs of one recipe (no times, no dates), so that a card is
reproducible like the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.hashes import file_sha256
from .card_allocation import allocation
from .card_experts import experts
from .card_figures import gates, measured
from .card_kv import compressed_cache
from .card_layers import export_notes, layers, limits
from .card_loading import loading
from .card_metadata import front_matter, metadata
from .card_provenance import licence, provenance
from .card_pruning import pruning
from .card_slimming import slimming
from .card_subject import Subject
from .kv_table import cache_of, kv_stages
from .layer_table import average_bits, exceptions
from .markdown import code, size

FILE_NAME = "README.md"


def _title(subject: Subject) -> Iterator[str]:
    model = subject.model
    used = [stage["method"] for stage in subject.document["stages"]] or [subject.export["format"]]
    methods = ", then ".join(code(method) for method in used)
    share = subject.size_bytes / model["bytes"]
    yield from (f"# {subject.name}", "")
    millions = f"{model['parameters'] / 1e6:.4g} M parameters"
    yield f"{code(subject.source)} ({model['class']}, {millions}), compressed"
    if subject.is_adapter:
        yield f"with {methods}. An adapter of {size(subject.export['bytes'])}, loaded onto the original,"
        yield "whose weights stay as they are."
    else:
        taken, before = size(subject.size_bytes), size(model["bytes"])
        yield f"with {methods}. The weights take {taken} instead of {before}:"
        yield f"**{share:.3f}** of the original."
    yield from (*_cache(subject), "")
    if subject.label:
        if subject.mixed_label:
            yield f"**{subject.mixed_label} on average, mixed**: layers have bits of their own, and this is"
            yield "the mean of those that had a choice. Averaged over all linear layers"
        else:
            yield f"Most weights are **{subject.label}**: averaged over all linear layers"
        yield f"**{average_bits(subject.linears):.2f} bits per weight**, scales not counted;"
        bits = 8 * subject.size_bytes / model["parameters"]
        yield f"{bits:.2f} bits per parameter with scales and everything else."
        yield ""
        if subject.mixed_label is None:
            yield from exceptions(subject.linears, subject.label)
            yield ""


def _cache(subject: Subject) -> Iterator[str]:
    """Say how much smaller the key-value cache is, where it was compressed."""
    found = subject.metrics.get("kv_bytes_ratio", 1)
    if found != 1:
        after = subject.metrics["kv_bytes_per_token"]
        yield f"Its key-value cache takes {size(after)} per token instead of {size(after / found)}:"
        yield f"**{found:.3f}** of the original's."
        for cache in map(cache_of, kv_stages(subject.document)):
            whole = cache["at_context"]
            share = whole["after"] / whole["before"]
            yield f"One sequence of {whole['tokens']:,} tokens takes {size(whole['after'])} instead of"
            yield f"{size(whole['before'])}, the exact window counted: **{share:.3f}**."
            yield f"The factors take {size(cache['factor_bytes'])} besides, once."


def render_card(
    document: Mapping[str, Any],
    figures: Sequence[str],
    recipe_text: str,
    *,
    place: str | None = None,
    revision: str | None = None,
) -> str:
    """Return the card's text.

    Args:
        document: the report, with the top keys `recipe, model, stages, evaluation, gates, export,
            environment`. The hashes of the weights are shown where `export.files` has them.
        figures: names of the pictures beside the card.
        recipe_text: the recipe as the user wrote it.
        place: Hub id that the checkpoint is loaded from; None: the folder of the report.
        revision: branch, tag or commit of `place`; None: its default branch.
    """
    subject = Subject(document, place, revision)
    sections = (
        [front_matter(metadata(subject)), ""],
        _title(subject),
        loading(subject),
        export_notes(subject),
        measured(subject, figures),
        gates(subject),
        experts(subject),
        pruning(subject),
        slimming(subject),
        compressed_cache(subject),
        allocation(subject),
        layers(subject),
        limits(subject),
        provenance(subject, recipe_text),
        licence(subject),
    )
    return "\n".join(line for section in sections for line in section).rstrip("\n") + "\n"


def write_card(
    folder: Path,
    document: Mapping[str, Any],
    figures: Sequence[str],
    *,
    recipe_text: str,
    place: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the card into `folder`, beside the weights; see `render_card`."""
    if "files" not in document["export"]:  # they are listed when the last of them, this card, is there
        weights = [
            {"name": path.relative_to(folder).as_posix(), "sha256": file_sha256(path)}
            for path in folder.rglob("*.safetensors")
        ]
        document = {**document, "export": {**document["export"], "files": weights}}
    text = render_card(document, figures, recipe_text, place=place, revision=revision)
    (folder / FILE_NAME).write_text(text, encoding="utf-8")
