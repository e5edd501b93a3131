"""The model card: what the folder holds, how to load it, what it costs, how it was made.

Everything in it comes from the report; nothing in it differs between two runs of one recipe (no
times, no dates), so that a card is reproducible like the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from .fresh_process import NOT_EXECUTED
from .layer_table import average_bits, exceptions, grouped, label_of

FILE_NAME = "README.md"

_PIPELINE_TAGS = (
    ("PixArtTransformer2DModel", "text-to-image"),
    ("SD3Transformer2DModel", "text-to-image"),
    ("FluxTransformer2DModel", "text-to-image"),
)
_CAPTIONS = {
    "samples.png": "Samples of the original and of this checkpoint from equal noise.",
    "sqnr_per_timestep.png": "Signal to error of one denoiser call at every sampling step.",
    "layer_error.png": "Signal to error of every block and its linears, each block on the original's input.",
    "bits.png": "Bits and bytes of the linear layers inside the blocks.",
}
_METRIC_ROWS = (
    ("sqnr_db", "denoiser SQNR, all steps", "{:.2f} dB"),
    ("sqnr_db_worst_step", "denoiser SQNR, worst step", "{:.2f} dB"),
    ("psnr_db", "PSNR of final samples", "{:.2f} dB"),
    ("ssim", "SSIM of final samples", "{:.4f}"),
)


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:.0f} {name}"
    return f"{count:.0f} B"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"
    yield ""


def _folder_name(document: Mapping[str, Any]) -> str:
    """Return the folder as a reader would type it; an absolute path says nothing to others."""
    path = PurePath(document["export"]["path"])
    return path.name if path.is_absolute() else path.as_posix()


def _metadata(document: Mapping[str, Any], label: str | None) -> Iterator[str]:
    model = document["model"]
    identifier = model["id"]
    license_ = model.get("license") or ("apache-2.0" if identifier.startswith("builtin:") else None)
    yield "---"
    if license_:
        yield f"license: {license_}"
    yield "library_name: diffusers"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", identifier) and not identifier.startswith("."):
        yield f"base_model: {identifier}"
        yield "base_model_relation: quantized"
    tag = dict(_PIPELINE_TAGS).get(model["class"])
    if tag:
        yield f"pipeline_tag: {tag}"
    yield "tags:"
    tags = ["compress", *(stage["method"].replace("_", "-") for stage in document["stages"])]
    yield from (f"- {name}" for name in dict.fromkeys(tags + ([label.lower()] if label else [])))
    yield "---"


def _title(document: Mapping[str, Any], label: str | None) -> Iterator[str]:
    model, metrics = document["model"], document["evaluation"]["metrics"]
    linears = document["evaluation"].get("linears", [])
    methods = ", then ".join(f"`{stage['method']}`" for stage in document["stages"])
    yield f"# {PurePath(_folder_name(document)).name}"
    yield ""
    # Other formats than our own do not store the bits that the model in memory has.
    size = metrics["bytes"] if document["export"]["format"] == "compress" else document["export"]["bytes"]
    yield f"`{model['id']}` ({model['class']}, {model['parameters'] / 1e6:.4g} M parameters), compressed"
    yield f"with {methods}. The weights take {_size(size)} instead of {_size(model['bytes'])}:"
    yield f"**{size / model['bytes']:.3f}** of the original."
    yield ""
    if label:
        yield f"Most weights are **{label}**: averaged over all linear layers"
        yield f"**{average_bits(linears):.2f} bits per weight**, scales not counted;"
        yield f"{8 * size / model['parameters']:.2f} bits per parameter with scales and everything else."
        yield ""
        yield from exceptions(linears, label)
        yield ""


def _loading(document: Mapping[str, Any]) -> Iterator[str]:
    export = document["export"]
    yield "## Load it"
    yield ""
    for way in export["loads_with"]:
        yield from (_introduction(way, export["format"]), "", "```python")
        yield from _code(way, export["format"], _folder_name(document))
        yield from ("```", "")
    yield "The folder holds this component and its scheduler, not a whole pipeline; pass it on as"
    yield "`transformer=model`. " + _verified(export)
    yield ""


def _introduction(way: str, format_: str) -> str:
    if "compress.load" in way:
        return "With compress:"
    return {
        "compress": "With the stock class, which `import compress` teaches the format:",
        "torchao": "With stock diffusers and torchao, without compress:",
        "sdnq": "With stock diffusers and the package sdnq, without compress:",
        "dequantized": "With stock diffusers alone:",
    }[format_ if "import compress" in way or format_ != "compress" else "dequantized"]


def _code(way: str, format_: str, folder: str) -> Iterator[str]:
    """Yield the lines of one way of `loads_with`, with its imports and the folder for `path`."""
    *statements, expression = way.split("; ")
    modules = [name for name in ("compress", "diffusers", "torch") if f"{name}." in expression]
    imports = [f"import {name}" for name in ([format_] if format_ == "sdnq" else []) + modules]
    yield from dict.fromkeys([*statements, *imports])
    yield "model = " + re.sub(r"\bpath\b", lambda _: json.dumps(folder, ensure_ascii=False), expression)


def _verified(export: Mapping[str, Any]) -> str:
    """Say what was done to verify the folder, and nothing more."""
    error, ways = export["max_abs_error"], ", ".join(f"`{way}`" for way in export["loads_with"])
    if not export["verified"]:
        if NOT_EXECUTED in export.get("notes", ()):
            return f"**It was not run before it was published**: {NOT_EXECUTED}."
        what = "it does not load, or gives other outputs" if error is None else f"the error is {error:.3g}"
        return f"**The verification failed**: reopened in a fresh process, {what}; see the notes below."
    done = f"Before it was published it was reopened in a fresh process with {ways}: the largest difference"
    if export["format"] == "sdnq":
        return (
            f"{done} to our own integer runtime was {error:.3g}, because the arithmetic of sdnq is its own."
        )
    return f"{done} to the outputs of the same layers in memory was {error:g}."


def _export_notes(document: Mapping[str, Any]) -> Iterator[str]:
    export = document["export"]
    notes = [note for note in export.get("notes", ()) if note != NOT_EXECUTED]
    if notes:
        yield "## Notes on the export" if export["format"] == "compress" else "## What the format changes"
        yield ""
        yield from (f"- {note[0].upper()}{note[1:]}." for note in notes)
        yield ""


def _figures(document: Mapping[str, Any], figures: Sequence[str]) -> Iterator[str]:
    metrics, details = document["evaluation"]["metrics"], document["evaluation"]
    model = document["model"]
    yield "## What it costs, what it saves"
    yield ""
    if "samples.png" in figures:
        yield f"![{_CAPTIONS['samples.png']}](samples.png)"
        yield ""
    rows = [
        ("tensor bytes", f"{model['bytes']:,}", f"{metrics['bytes']:,}"),
        ("share of the original's bytes", "1", f"{metrics['size_ratio']:.4f}"),
        (
            "bits per parameter, everything counted",
            f"{model['bits_per_weight']:.2f}",
            f"{metrics['bits_per_weight']:.2f}",
        ),
        ("bytes of the weight files, headers included", "", f"{document['export']['bytes']:,}"),
        ("parameters", f"{model['parameters']:,}", f"{metrics['parameters']:,}"),
        ("multiply-accumulates of one forward", f"{model['macs']:,}", f"{metrics['macs']:,}"),
    ]
    if "linear_bytes_ratio" in metrics:
        rows.append(
            (
                "quantized attention and feed-forward linears, share of bfloat16",
                "1",
                f"{metrics['linear_bytes_ratio']:.4f}",
            )
        )
    rows += [(text, "", form.format(metrics[name])) for name, text, form in _METRIC_ROWS if name in metrics]
    if "class_agreement" in metrics:
        rows += [
            (
                "class agreement",
                f"{metrics['class_agreement_original']:.1%}",
                f"{metrics['class_agreement']:.1%}",
            ),
            ("feature FID", f"{metrics['fid_original']:.3f}", f"{metrics['fid']:.3f}"),
        ]
    yield from _table(("", "original", "this checkpoint"), rows)
    yield from _notes(details)
    yield "All figures were measured by `compress run recipe.yaml`; `report.json` has them in full."
    yield ""
    for name in figures:
        if name != "samples.png":
            yield f"![{_CAPTIONS.get(name, name)}]({name})"
            yield ""


def _notes(details: Mapping[str, Any]) -> Iterator[str]:
    """Say how the figures of the table were measured."""
    fidelity, quality = details.get("fidelity"), details.get("quality")
    if fidelity:
        yield (
            f"- Fidelity: {fidelity['samples']} samples, {fidelity['steps']} steps, guidance"
            f" {fidelity['guidance_scale']:g}, seed {fidelity['seed']}. SQNR: the compressed denoiser on the"
            " inputs of the original's own trajectories. PSNR and SSIM: both models from equal noise, on"
            f" {fidelity['compared']}."
        )
    if quality and "skipped" in quality:
        yield f"- {quality['skipped'][0].upper()}{quality['skipped'][1:]}."
    elif quality:
        yield (
            f"- Quality: {quality['samples']} samples, {quality['steps']} steps, guidance"
            f" {quality['guidance_scale']:g}, seed {quality['seed']}, judged by the classifier that ships"
            f" with compress ({quality['classifier_test_accuracy']:.1%} right on real test images). FID is on"
            " its features and comparable within this table only; its floor, real test images"
            f" against training images, is {quality['fid_floor']:.3f} with 10,000 images, higher with fewer."
        )
    yield ""


def _gates(document: Mapping[str, Any]) -> Iterator[str]:
    gates = document["gates"]
    if not gates:
        return
    yield "## What the recipe required"
    yield ""
    rows = (
        (
            f"`{gate['metric']}`",
            gate["expected"],
            _measured(gate["measured"]),
            "yes" if gate["passed"] else "**no**",
        )
        for gate in gates
    )
    yield from _table(("metric", "required", "measured", "holds"), rows)


def _measured(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.5g}"


def _layers(document: Mapping[str, Any]) -> Iterator[str]:
    linears = document["evaluation"].get("linears", [])
    if not linears:
        return
    yield "## Layers"
    yield ""
    rows = [
        (f"`{pattern}`", weight, activation, scale, count, f"{size:,}" if size else "0 (a stored copy)", why)
        for pattern, weight, activation, scale, count, size, why in grouped(linears)
    ]
    yield from _table(
        ("linear layers", "weight bits", "activation bits", "scale per", "layers", "bytes", "decided by"),
        rows,
    )
    if document["export"]["format"] == "sdnq":
        yield "Bytes as `compress` would pack them; the format `sdnq` stores scales in its own way, see the"
        yield "size of the file above."
    else:
        rest = document["evaluation"]["metrics"]["bytes"] - sum(row["bytes"] for row in linears)
        other = "all other tensors together have"
        if document["export"]["format"] != "compress":
            other = "all other tensors, stored copies and file headers together have"
        yield f"Bytes count weights, scales, zero points and biases; {other}"
        yield f"{rest:,}."
    yield ""


def _limits(document: Mapping[str, Any]) -> Iterator[str]:
    linears = [row for row in document["evaluation"].get("linears", []) if row["method"]]
    format_ = document["export"]["format"]
    yield "## What it does not do"
    yield ""
    if format_ == "dequantized":
        yield "- This format stores the rounded weights in floating point: neither smaller nor faster than"
        yield "  the original, and activations are not quantized."
    if any(row["weight_bits"] < 8 for row in linears):
        yield (
            "- Weights below 8 bits make the file smaller; the product itself runs on 8-bit integers and is"
            " no faster than with 8-bit weights."
        )
    if any(row["activation_bits"] is None for row in linears):
        yield "- Quantized layers without activation bits are weight-only: their product is floating point."
    yield "- Attention products, softmax, normalisation and the layers listed as floating point run as in the"
    yield "  original."
    yield "- No speed was measured in this run; small widths and small batches gain little or lose."
    yield ""


def _provenance(document: Mapping[str, Any], recipe_text: str) -> Iterator[str]:
    model, environment = document["model"], document["environment"]
    yield "## How it was made"
    yield ""
    yield "    compress run recipe.yaml"
    yield ""
    yield "with `recipe.yaml`, which is also in this folder; `report.json` has it with every default and"
    yield "override resolved:"
    yield ""
    yield "```yaml"
    yield recipe_text.rstrip("\n")
    yield "```"
    yield ""
    rows = [("source", f"`{model['id']}`" + (f" at `{model['revision']}`" if model.get("revision") else ""))]
    rows += [(f"SHA-256 of `{name}`", f"`{value}`") for name, value in sorted(model["hashes"].items())]
    rows += [
        ("seed", environment["seed"]),
        ("device", f"{environment['device']} ({environment['platform']})"),
    ]
    rows += [(name, version) for name, version in environment["versions"].items()]
    yield from _table(("", ""), rows)
    yield "The SHA-256 of every file of this folder is in `report.json`; `compress verify` checks them."


def render_card(document: Mapping[str, Any], figures: Sequence[str], recipe_text: str) -> str:
    """Return the card's text.

    Args:
        document: the report, with the top keys `recipe, model, stages, evaluation, gates, export,
            environment`.
        figures: names of the pictures beside the card.
        recipe_text: the recipe as the user wrote it.
    """
    label = label_of(document["evaluation"].get("linears", []))
    sections = (
        _metadata(document, label),
        _title(document, label),
        _loading(document),
        _export_notes(document),
        _figures(document, figures),
        _gates(document),
        _layers(document),
        _limits(document),
        _provenance(document, recipe_text),
    )
    return "\n".join(line for section in sections for line in section) + "\n"


def write_card(
    folder: Path, document: Mapping[str, Any], figures: Sequence[str], *, recipe_text: str
) -> None:
    """Write the card into `folder`; see `render_card`."""
    (folder / FILE_NAME).write_text(render_card(document, figures, recipe_text), encoding="utf-8")
