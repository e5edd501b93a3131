"""What people see of a checkpoint: sizes, what was cut and trained, layers, and how it was made.

Columns in which nothing stands are left out; `--json` has everything.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ..exporters.depth_table import removals
from ..exporters.experts_table import expert_stages
from ..exporters.pruning_table import prunings, recoveries
from ..exporters.slimming_table import slimmings
from . import _depth, _experts, _kv, _pruning, _slimming
from ._tables import Section, Table
from ._units import amount, plain, size

Document = Mapping[str, Any]

_WIDTH = 80  # of a terminal
_NOTHING = ("-", "no")
_OF_LAYERS = (
    ("name", "name"), ("bits", "bits"), ("bytes", "bytes"), ("dtype", "dtype"),
    ("activation_bits", "act. bits"), ("activation_scope", "scale per"),
    ("first_token_stored", "first token stored"), ("group_size", "group size"),
    ("decided_by", "decided by"), ("method", "method"), ("shared_with", "shared with"),
)  # fmt: skip


def sections(document: Document) -> Iterator[Section]:
    """Yield what `inspect` shows of the document that `exporters.inspection` makes."""
    yield _head(document)
    if len(document["files"]) > 1:
        yield Table(
            "files", ["name", "bytes"], [[row["name"], size(row["bytes"])] for row in document["files"]]
        )
    history = {"stages": document["history"]}
    for stage in removals(history):
        yield textwrap.fill(_depth.short(stage), _WIDTH, subsequent_indent="  ")
    for stage in expert_stages(history):
        yield textwrap.fill(_experts.short(stage), _WIDTH, subsequent_indent="  ")
    for stage in prunings(history):
        yield _pruning.removed(stage)
        yield _pruning.costs(stage)
    for stage in slimmings(history):
        yield _slimming.widths(stage)
        yield _slimming.costs(stage)
    for stage in recoveries(history):
        yield textwrap.fill(_pruning.training(stage), _WIDTH, subsequent_indent="  ")
    if document["layers"]:
        yield _layers(document["layers"])
    if document["history"]:
        yield "history"
        for number, entry in enumerate(document["history"], 1):
            yield _made_by(number, entry)


def _head(document: Document) -> Table:
    cut, shared = document["cut"], document["shared"]
    stored, once = document["parameters_stored"], document["parameters"]
    rows = [
        ("path", document["path"]),
        ("class", document["class"]),
        ("format", document["format"]),
        ("adapter of", _base(document.get("base"))),
        ("dtype", document["dtype"]),
        ("bytes of the weight files", size(document["bytes"])),
        ("bytes of the tensors", size(document["tensor_bytes"])),
        ("parameters", amount(once)),
        ("parameters, copies counted", amount(stored) if stored != once else None),
        ("depth", _depth.of_original(document["depth"]) if document["depth"] else None),
        ("experts", _experts.of_original(document["experts"]) if document["experts"] else None),
        *(_kv.of_folder(document["kv_cache"]) if document["kv_cache"] else ()),
        ("bits per weight, everything counted", document["bits_per_weight"]),
        ("bits of the quantized weights", document["quantized_bits"]),
        ("copies that are not stored", shared or None),
        ("modules with sizes of their own", f"{cut}, listed in compress.json" if cut else None),
    ]
    return Table("", ["", "value"], [[name, plain(value)] for name, value in rows if value is not None])


def _base(base: Document | None) -> str | None:
    """Name the model that an adapter goes with."""
    if base is None:
        return None
    return base["id"] + (f"@{base['revision']}" if base["revision"] else "")


def _layers(layers: list[Document]) -> Table:
    # Where nothing is quantized, bits and dtype of all layers are those of the model.
    alike = len({layer["dtype"] for layer in layers}) == 1 and not any(layer["method"] for layer in layers)
    columns = [("shape", [" x ".join(map(str, layer["shape"])) for layer in layers])]
    for key, title in _OF_LAYERS:
        cells = [size(layer[key]) if key == "bytes" else plain(layer[key]) for layer in layers]
        said = not (alike and key in ("bits", "dtype"))
        if said and any(cell not in _NOTHING for cell in cells):
            columns.insert(0 if key == "name" else len(columns), (title, cells))
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    return Table("layers", [title for title, _ in columns], rows)


def _made_by(number: int, entry: Document) -> str:
    chosen = "; ".join(f"{key} {plain(value)}" for key, value in _chosen(entry).items())
    text = f"{number}. {entry['method']}, seed {entry['seed']}{': ' if chosen else ''}{chosen}"
    return textwrap.fill(text, _WIDTH, initial_indent="  ", subsequent_indent="     ")


def _chosen(entry: Document) -> dict[str, Any]:
    """Return the settings of a stage that are not what they are anyway."""
    from ..recipes.stages import STAGES

    found = STAGES.get(entry["method"])
    fields = {} if found is None else found.model_fields
    defaults = {key: _json(field.get_default(call_default_factory=True)) for key, field in fields.items()}
    return {
        key: _without_nulls(value)
        for key, value in entry["settings"].items()
        if value != defaults.get(key) and value not in (None, [], {})
    }


def _json(value: Any) -> Any:
    """Return a default as it stands in a manifest."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
