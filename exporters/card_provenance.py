"""The card's provenance: recipe, inputs, outputs, versions, seeds, licence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..models.source_card import WEB_LINK
from .card_subject import Subject
from .markdown import code, fenced, table


def provenance(subject: Subject, recipe_text: str) -> Iterator[str]:
    """Yield the section on how the checkpoint was made.

    Args:
        recipe_text: the recipe as the user wrote it.
    """
    yield from (
        "## How it was made",
        "",
        "By this recipe, which makes the same files again, compared by hash:",
        "",
    )
    yield from (f"    compress run --reproduce {subject.target}", "")
    yield f"It is also `recipe.yaml` in {subject.here}; `report.json` has it with every default and override"
    yield from ("resolved:", "")
    yield from fenced(recipe_text, "yaml")
    yield from table(("", ""), _rows(subject))
    yield f"The SHA-256 of every file of {subject.here} is in `report.json`. This checks them, and the gates:"
    yield from ("", f"    compress verify {subject.target}", "")


def _rows(subject: Subject) -> list[tuple[str, Any]]:
    model, environment = subject.model, subject.document["environment"]
    revision = subject.source_revision
    rows: list[tuple[str, Any]] = [
        ("source", code(subject.source) + (f" at {code(revision)}" if revision else ""))
    ]
    rows += [
        (f"SHA-256 of the source's {code(name)}", code(value)) for name, value in _sorted(model["hashes"])
    ]
    rows += [(f"SHA-256 of {code(name)}", code(value)) for name, value in _weights(subject)]
    rows.append(("seed", environment["seed"]))
    for part in ("fidelity", "quality"):
        details = subject.document["evaluation"].get(part) or {}
        if "seed" in details:
            rows.append((f"seed of the {part} samples", details["seed"]))
    rows.append(("device", f"{environment['device']} ({environment['platform']})"))
    return rows + list(environment["versions"].items())


def _sorted(hashes: dict[str, str]) -> list[tuple[str, str]]:
    return sorted(hashes.items())


def _weights(subject: Subject) -> list[tuple[str, str]]:
    """Return the output's weight files; the rest stands in the report, this card among it."""
    files = subject.export.get("files", ())
    return sorted((row["name"], row["sha256"]) for row in files if row["name"].endswith(".safetensors"))


def licence(subject: Subject) -> Iterator[str]:
    """Yield the section on the licence."""
    known, name = subject.model.get("license"), subject.model.get("license_name")
    yield from ("## Licence", "")
    if known is None:
        yield f"The licence of {code(subject.source)} is not known: its own card names none that could be"
        yield "read. Ask whoever made it before you use or pass on what was derived from it."
        return
    names = ", ".join(code(item) for item in ([known] if isinstance(known, str) else known))
    yield f"That of {code(subject.source)}: {names}" + (f" ({code(name)})." if name else ".")
    if "license_link" in subject.model:
        link = str(subject.model["license_link"])
        yield f"Its text: {f'<{link}>' if WEB_LINK.fullmatch(link) else code(link)}."
