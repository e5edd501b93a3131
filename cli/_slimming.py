"""What stages that slimmed a Segment Anything encoder say of it: for people."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ..exporters.slimming_table import (
    Document,
    alignings,
    choice_told,
    cost_rows,
    phase_rows,
    slimmings,
    training_told,
    width_rows,
)
from ._tables import Section, Table
from ._units import amount

_WIDTH = 80  # of a terminal
_FIGURES = (
    ("mask_agreement", "agreement of masks with the original's {:.4f}"),
    ("miou", "mIoU with true masks {:.4f}"),
    ("sqnr_db", "SQNR of the embedding {:.2f} dB"),
)


def sections(document: Document) -> Iterator[Section]:
    """Yield widths, costs and phases of every stage that slimmed.

    Args:
        document: a report; nothing is yielded where no stage did so.
    """
    for stage in slimmings(document):
        details = stage["details"]
        yield widths(stage)
        yield costs(stage)
        yield _phases(stage)
        for phase in alignings(details):
            yield _filled(f"{stage['method']}: {phase['name']}: {training_told(phase)}")
        yield _filled(f"{stage['method']}: {_images(details)}")
        yield from _measured(stage)


def widths(stage: Document) -> Table:
    """Return a table of the widths of an encoder before and after a stage."""
    rows = [[name, str(layers), *cells] for name, layers, *cells in width_rows(stage["details"])]
    return Table(f"{stage['method']}: widths", ["", "layers", "before", "after", "kept"], rows)


def costs(stage: Document) -> Table:
    """Return a table of parameters and work before and after a stage, in both conventions."""
    rows = [
        [_short(name), amount(before), amount(after), f"{after / before:.1%}"]
        for name, before, after in cost_rows(stage["details"])
    ]
    return Table("", ["", "before", "after", "kept"], rows)


def _short(name: str) -> str:
    return name.replace("multiply-accumulates", "MACs").replace(", as the paper counts", " (paper)")


def _phases(stage: Document) -> Table:
    rows = list(phase_rows(stage["details"]))
    with_masks = any(miou is not None for _, _, miou in rows)
    cells = [
        [name, f"{error:.4g}", *([f"{miou:.4f}" if miou is not None else "-"] if with_masks else [])]
        for name, error, miou in rows
    ]
    columns = ["after", "error of the output", *(["mIoU"] if with_masks else [])]
    return Table(f"{stage['method']}: on the choice images", columns, cells)


def _images(details: Document) -> str:
    return (
        f"scored on {details['score_images']:,} images, aligned on {details['train_images']:,}, weights"
        f" chosen by {choice_told(details['choice'])}"
    )


def _measured(stage: Document) -> Iterator[str]:
    """Yield what was measured right after a stage that was not the last."""
    found: dict[str, Any] = stage["details"].get("measured") or {}
    told = [form.format(found[key]) for key, form in _FIGURES if key in found]
    if told:
        yield _filled(f"{stage['method']}: right after it, on held-out images: {'; '.join(told)}")


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent="  ")
