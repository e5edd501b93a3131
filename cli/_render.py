"""Documents to tables: what people see of a report, a plan or any other result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..exporters.tensors_seen import compared_tensors
from . import _allocation, _experts, _kv, _pruning, _slimming
from ._tables import Section, Table
from ._units import amount, duration, plain, size

Document = Mapping[str, Any]

_SIZES = (
    ("parameters", "parameters", amount),
    ("active_parameters", "parameters a token meets", amount),
    ("macs", "multiply-accumulates", amount),
    ("bytes", "bytes", size),
    ("bits_per_weight", "bits per weight", plain),
    ("kv_bytes_per_token", "KV cache, bytes per token", size),
)


def before_after(first: Document, last: Document, title: str = "before and after") -> Table:
    """Compare two sizes, row by row."""
    rows = []
    for key, label, write in _SIZES:
        if key not in first or key not in last:
            continue
        share = f"{last[key] / first[key]:.3f} x" if first[key] else "-"
        rows.append([label, write(first[key]), write(last[key]), share])
    return Table(title, ["", "before", "after", "ratio"], rows)


def gates(rows: Sequence[Document]) -> list[Section]:
    """Show what was required and what was measured."""
    if not rows:
        return []
    body = [
        [row["metric"], row["expected"], plain(row["measured"]), "passed" if row["passed"] else "FAILED"]
        for row in rows
    ]
    return [Table("required", ["metric", "required", "measured", ""], body)]


def metrics(values: Document) -> list[Section]:
    """Show measured metrics."""
    if not values:
        return []
    return [
        Table("measured", ["metric", "value"], [[name, _cell(name, value)] for name, value in values.items()])
    ]


def single_reports(document: Document) -> list[dict[str, Any]]:
    """Return one report per export: a recipe with a list of exports has lists under three keys."""
    if not isinstance(document["export"], list):
        return [dict(document)]
    parts = zip(document["evaluation"], document["gates"], document["export"], strict=True)
    return [
        {**document, "evaluation": evaluation, "gates": gates, "export": export}
        for evaluation, gates, export in parts
    ]


def report(document: Document) -> list[Section]:
    """Show a run's report."""
    sections: list[Section] = []
    stages = document["stages"]
    if stages:
        rows = [
            [
                stage["method"],
                "reused" if stage["resumed"] else duration(stage["seconds"]),
                size(stage["peak_rss_bytes"]),
                size(stage["after"]["bytes"]),
            ]
            for stage in stages
        ]
        sections.append(Table("stages", ["stage", "time", "peak memory", "bytes after"], rows))
        sections += [line for stage in stages for line in _allocation.lines(stage)]
        sections += _experts.sections(document)
        sections += _pruning.sections(document)
        sections += _slimming.sections(document)
        sections += _kv.sections(document)
        sections += _pruning.advice(document)
        sections.append(before_after(stages[0]["before"], stages[-1]["after"]))
    for single in single_reports(document):
        sections += judgement(single)
    return sections


def judgement(document: Document) -> list[Section]:
    """Show what was measured and required of one export, where it lies and where it was pushed."""
    export = document["export"]
    seen = "NOT verified; see its notes"
    if export["verified"]:
        seen = "reopened in a fresh process: equal outputs"
    if export["verified"] and compared_tensors(export):
        seen = "compared with its source in a fresh process: equal tensors; no outputs were computed"
    return [
        *metrics(document["evaluation"].get("metrics", {})),
        *_experts.answered(document["evaluation"]),
        *_kv.decoded(document["evaluation"]),
        *gates(document["gates"]),
        f"{export['path']}  ({export['format']}, {size(export['bytes'])}; {seen})",
        *pushed(export.get("push")),
    ]


def pushed(push: Document | None) -> list[Section]:
    """Show where a folder was pushed; nothing where it was not."""
    if push is None:
        return []
    fields = (
        ("repository", push.get("repo")),
        ("visibility", "private" if push.get("private") else "public"),
        ("revision", push.get("revision")),
        ("commit", push.get("commit")),
        ("tag", push.get("tag")),
        ("pull request", push.get("pull_request")),
        ("files sent", "none: up to date" if push.get("up_to_date") else push.get("files_sent")),
        ("downloaded and verified again", push.get("verified")),
    )
    rows = [[name, plain(value)] for name, value in fields if value is not None]
    notes = [f"note: {note}" for note in push.get("notes", ())]
    return [Table("pushed", ["", str(push.get("url", ""))], rows), *notes]


def reproduction(document: Document) -> list[Section]:
    """Show which files a second run of a folder's recipe gave again."""
    rows = [
        [row["name"], plain(row["expected"]), plain(row["measured"]), "ok" if row["equal"] else "FAILED"]
        for row in document["files"]
    ]
    table = Table("files", ["file", "sha256 in the report", "sha256 of the new run", ""], rows)
    return [table, *(f"note: {text}" for text in document["differences"])]


def plan(document: Document) -> list[Section]:
    """Show a plan."""
    sections: list[Section] = []
    stages = document["stages"]
    rows = [
        [
            stage["method"],
            size(stage["before"]["bytes"]),
            _after(stage, lambda item: size(item["bytes"])),
            _after(stage, lambda item: plain(item["bits_per_weight"])),
            size(stage["peak_memory_bytes"]),
        ]
        for stage in stages
    ]
    if stages:
        columns = ["stage", "bytes before", "bytes after", "bits per weight", "peak memory"]
        sections.append(Table("planned stages", columns, rows))
        sections += _pruning.sections(document)
        sections.append(before_after(stages[0]["before"], stages[-1]["after"]))
        if "after_at_least" in stages[-1]:
            title = "before and after, at the least"
            sections.append(before_after(stages[0]["before"], stages[-1]["after_at_least"], title))
    notes = [f"{stage['method']}: {note}" for stage in stages for note in stage["notes"]]
    sections += [f"note: {note}" for note in notes]
    found = document["export"]
    for export in found if isinstance(found, list) else [found]:
        of = f" of {export['path']} ({export['format']})" if isinstance(found, list) else ""
        what = "adapter" if export.get("kv_cache") == "adapter" else "exported weights"
        sections.append(f"predicted size of the {what}{of}: {_predicted(export)}")
    return sections


def _after(stage: Document, write: Callable[[Document], str]) -> str:
    """Show a size after a stage, as a range where data decide it."""
    most = write(stage["after"])
    least = write(stage.get("after_at_least", stage["after"]))
    return most if least == most else f"{least} to {most}"


def _predicted(export: Document) -> str:
    """Say what an export will take; of a padded one also what padding costs."""
    least, unpadded = export["bytes"], export.get("bytes_unpadded")
    if "bytes_at_least" in export:
        return f"{size(export['bytes_at_least'])} to {size(least)}, depending on the data"
    if unpadded is None:
        return size(least)
    if export["bytes_at_most"] == least:
        return f"{size(least)}, padded to equal widths; without padding {size(unpadded)}"
    return (
        f"{size(least)} to {size(export['bytes_at_most'])}, padded to the widest layers, which scores decide"
        f" (see --with-scores); without padding {size(unpadded)}"
    )


def anything(document: Document, title: str = "") -> list[Section]:
    """Show a JSON document whose shape is its writer's: values, then lists of mappings as tables."""
    flat: list[list[str]] = []
    nested: list[Section] = []
    for key, value in document.items():
        name = f"{title}.{key}" if title else str(key)
        if isinstance(value, Mapping) and value:
            nested += anything(value, name)
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            nested.append(_rows(name, value))
        else:
            flat.append([str(key), _cell(str(key), value)])
    head: list[Section] = [Table(title, ["", "value"], flat)] if flat else []
    return head + nested


def _rows(title: str, items: Sequence[Document]) -> Table:
    columns = list(dict.fromkeys(key for item in items for key in item))
    return Table(title, columns, [[_cell(key, item.get(key)) for key in columns] for item in items])


def _cell(key: str, value: Any) -> str:
    is_count = isinstance(value, int | float) and not isinstance(value, bool)
    if is_count and (key == "bytes" or key.endswith("_bytes")):
        return size(value)
    if is_count and key in ("parameters", "parameters_stored", "macs"):
        return amount(value)
    return plain(value)
