"""The card's figures: what was measured, by which command, held against what was required."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .card_masks import mask_notes, mask_rows
from .card_subject import Subject
from .depth_table import removals
from .experts_table import measure_told
from .kv_table import cache_of, kv_stages, whole_cache_row
from .markdown import code, sentence, table
from .pruning_table import prunings, steps_of

_CAPTIONS = {
    "samples.png": "Samples of the original and of this checkpoint from equal noise.",
    "masks.png": "Masks of the original and of this checkpoint at the same points of images that nothing was"
    " trained on: of every image the point at which the original is surest.",
    "sqnr_per_timestep.png": "Signal to error of one denoiser call at every sampling step.",
    "layer_error.png": "Signal to error of every block and its linears, each block on the original's input."
    " Linears whose output can absorb scales, such as value projections, are left out.",
    "bits.png": "Bits and bytes of the linear layers inside the blocks.",
    "sensitivity.png": "Signal to error of the output with one layer's weight quantized, layer by layer.",
    "error_over_bytes.png": "Measured error over bytes: this checkpoint, other budgets, and equal bits.",
    "blocks.png": "Blocks that stay, counted from 0.",
    "choices.png": "How the search settled: the probability of every group's choice over its steps.",
    "experts.png": "Experts of every layer: which stay, or how much of each went into those that stay.",
    "fitness.png": "Fitness of every evaluation of the search on the train items, and the best so far.",
    "slimming.png": "Error of the encoder's output after every phase, and how the alignings went, on the"
    " images by which their weights were chosen.",
    "widths.png": "Width of every layer before and after pruning.",
    "scores.png": "Scores of the channels that competed with each other: kept and removed."
    " A head goes as a whole.",
    "kv_singular_values.png": "Singular values of every layer's keys and values on the calibration text."
    " Those up to the mark are kept.",
    "decoding.png": "Mean loss of a decoded token by its distance from the prompt.",
    "training_loss.png": "Loss of the training after pruning.",
}
_FIRST = ("samples.png", "masks.png")  # what a model is for
_COUNTED = ("blocks.png", "experts.png")  # whose places are those of the model before
_METRIC_ROWS = (
    ("sqnr_db", "denoiser SQNR, all steps", "{:.2f} dB"),
    ("sqnr_db_worst_step", "denoiser SQNR, worst step", "{:.2f} dB"),
    ("psnr_db", "PSNR of final samples", "{:.2f} dB"),
    ("ssim", "SSIM of final samples", "{:.4f}"),
)


def measured(subject: Subject, figures: Sequence[str]) -> Iterator[str]:
    """Yield the section of measured figures.

    Args:
        figures: names of the pictures beside the card.
    """
    yield from ("## What it costs, what it saves", "")
    first = [name for name in figures if name in _FIRST]
    for name in first:
        yield from _picture(name, subject)
    yield from table(("", "original", "this checkpoint"), _rows(subject))
    yield from _notes(subject.document["evaluation"])
    yield from _commands(subject)
    for name in figures:
        if name not in first:
            yield from _picture(name, subject)


def _picture(name: str, subject: Subject) -> Iterator[str]:
    caption, first, number = _CAPTIONS.get(name, name), name, 1
    later = re.fullmatch(r"(.+)_(\d+)\.png", name)
    if later and f"{later[1]}.png" in _CAPTIONS:
        first, number = f"{later[1]}.png", int(later[2])
        caption = f"{_CAPTIONS[first]} Stage {number} of this kind."
        caption += " They are counted in the model before it." if first in _COUNTED else ""
    if name == "samples.png" and _between(subject):
        caption += " Between them, samples of the model as it was after the stages that are named."
    if name == "layer_error.png" and removals(subject.document):
        caption += " Blocks are counted in this checkpoint, and held against those that they come from."
    pruned = prunings(subject.document)
    if first == "scores.png" and number <= len(pruned):
        steps = steps_of(pruned[number - 1]["details"])
        caption += f" Of the last of {steps} steps; each has scores of its own." if steps > 1 else ""
    yield from (f"![{caption}]({name})", "")


def _between(subject: Subject) -> bool:
    """Tell whether samples were drawn between stages."""
    stages = subject.document["stages"]
    return any("psnr_db" in ((stage.get("details") or {}).get("measured") or {}) for stage in stages)


def _rows(subject: Subject) -> list[tuple[str, str, str]]:
    metrics, model = subject.metrics, subject.model
    rows = [
        ("tensor bytes, copies counted once", f"{model['bytes']:,}", f"{metrics['bytes']:,}"),
        ("share of the original's bytes", "1", f"{metrics['size_ratio']:.4f}"),
        (
            "bits per parameter, everything counted",
            f"{model['bits_per_weight']:.2f}",
            f"{metrics['bits_per_weight']:.2f}",
        ),
        ("bytes of the weight files, headers included", "", f"{subject.export['bytes']:,}"),
        ("parameters", f"{model['parameters']:,}", f"{metrics['parameters']:,}"),
        ("multiply-accumulates of one forward", f"{model['macs']:,}", f"{metrics['macs']:,}"),
    ]
    if "linear_bytes_ratio" in metrics:
        what = "quantized layers of the blocks, share of bfloat16"
        rows.append((what, "1", f"{metrics['linear_bytes_ratio']:.4f}"))
    if "speed" in subject.document["evaluation"]:
        rows += _speed_rows(subject.document["evaluation"]["speed"])
    # Beside a compressed cache this says what happened to the weights, and nothing of the cache.
    text = subject.document["evaluation"].get("text", {})
    one_pass = ", read in one pass" if "note" in text or kv_stages(subject.document) else ""
    for name, what, form in _METRIC_ROWS:
        if name in metrics:
            rows.append((_output_named(metrics, what, one_pass), "", form.format(metrics[name])))
    rows += _classifier_rows(metrics)
    rows += mask_rows(metrics)
    if "perplexity" in metrics:
        before, after = f"{metrics['perplexity_original']:.4f}", f"{metrics['perplexity']:.4f}"
        rows.append((f"perplexity on text that was not calibrated on{one_pass}", before, after))
        what = f"divergence of the next token's distribution{one_pass}, nats"
        rows.append((what, "0", f"{metrics['kl']:.5f}"))
    rows += _cache_rows(subject.document, metrics)
    rows += _answer_rows(subject.document["evaluation"])
    if "class_agreement" in metrics:
        before, after = f"{metrics['class_agreement_original']:.1%}", f"{metrics['class_agreement']:.1%}"
        rows.append(("class agreement", before, after))
        rows.append(("feature FID", f"{metrics['fid_original']:.3f}", f"{metrics['fid']:.3f}"))
    return rows


def _output_named(metrics: Mapping[str, Any], denoiser: str, one_pass: str) -> str:
    """Say what an SQNR is of, by the figures that are beside it."""
    if "mask_agreement" in metrics:
        return "SQNR of the embedding of an image"
    of_logits = "perplexity" in metrics or "top1_agreement" in metrics
    return f"SQNR of the logits{one_pass}" if of_logits else denoiser


def _cache_rows(document: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return what a key-value cache takes where it was compressed, and how the model decodes with it."""
    rows = []
    if metrics.get("kv_bytes_ratio", 1) != 1:
        after = metrics["kv_bytes_per_token"]
        before = f"{after / metrics['kv_bytes_ratio']:,.0f}"
        rows.append(("KV cache, bytes per token", before, f"{after:,.7g} ({metrics['kv_bytes_ratio']:.1%})"))
        rows += [whole_cache_row(cache_of(stage)["at_context"]) for stage in kv_stages(document)]
    if "decode_perplexity" in metrics:
        before, after = (f"{metrics[f'decode_perplexity{name}']:.4f}" for name in ("_original", ""))
        rows.append(("perplexity of the same text, token by token through the cache", before, after))
    return rows


def _speed_rows(speed: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for what, found in (("", speed), (" of the image encoder", speed.get("encoder"))):
        if found is not None:
            text = f"one forward{what} of {speed['batch_size']}, shortest of {speed['rounds']}, milliseconds"
            before, after = (f"{1000 * found[name]:.4g}" for name in ("original_seconds", "seconds"))
            yield text, before, f"{after} ({found['speedup']:.2f} times as fast)"


def _answer_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found, metrics = evaluation.get("answers"), evaluation["metrics"]
    if not found:
        return []
    pairs = (
        (metrics["answers_original"], found["original_standard_error"]),
        (metrics["answers"], found["standard_error"]),
    )
    before, after = (
        f"{share:.1%}" + ("" if error is None else f" ± {100 * error:.1f}") for share, error in pairs
    )
    title = f"{measure_told(found)}, of {found['items']:,} items, ± standard error in points"
    return [(title, before, after)]


def _classifier_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if "accuracy" in metrics:
        before, after = f"{metrics['accuracy_original']:.2%}", f"{metrics['accuracy']:.2%}"
        rows.append(("accuracy on images that were not trained on", before, after))
    if "top1_agreement" in metrics:
        rows.append(
            ("images answered as the original answers them", "100%", f"{metrics['top1_agreement']:.2%}")
        )
        rows.append(("divergence of the distribution of classes, nats", "0", f"{metrics['kl']:.5f}"))
    return rows


def _notes(details: Mapping[str, Any]) -> Iterator[str]:
    """Say how the figures of the table were measured."""
    fidelity, quality, text = details.get("fidelity"), details.get("quality"), details.get("text")
    if details.get("segmentation"):
        yield from mask_notes(details["segmentation"])
        return
    if details.get("images"):
        yield from _image_notes(details)
        return
    if text:
        yield (
            f"- Fidelity: {text['samples']} sequences of {text['length']} tokens of the recipe's text, chosen"
            f" with seed {text['seed']}, none of them calibrated on; {text['tokens']:,} tokens are scored."
            " Each sequence is read by itself: the perplexities compare within this table only."
            + (f" {sentence(text['note'])}" if "note" in text else "")
        )
    if fidelity:
        yield (
            f"- Fidelity: {fidelity['samples']} samples, {fidelity['steps']} steps, guidance"
            f" {fidelity['guidance_scale']:g}, seed {fidelity['seed']}. SQNR: the compressed denoiser on the"
            " inputs of the original's own trajectories. PSNR and SSIM: both models from equal noise, on"
            f" {fidelity['compared']}."
        )
    if quality and "skipped" in quality:
        yield f"- {sentence(quality['skipped'])}"
    elif quality:
        yield (
            f"- Quality: {quality['samples']} samples, {quality['steps']} steps, guidance"
            f" {quality['guidance_scale']:g}, seed {quality['seed']}, judged by the classifier that ships"
            f" with compress ({quality['classifier_test_accuracy']:.1%} right on real test images). FID is on"
            " its features and comparable within this table only; its floor, real test images"
            f" against training images, is {quality['fid_floor']:.3f} with 10,000 images, higher with fewer."
        )
    if fidelity or quality or text:
        yield ""


def _image_notes(details: Mapping[str, Any]) -> Iterator[str]:
    """Say on which images a classifier was measured."""
    held_out, seed = details["images"]["held_out"], details["images"]["seed"]
    counts = [
        f"{name} on {details[part]['samples']:,}"
        for part, name in (("fidelity", "agreement with the original"), ("quality", "accuracy"))
        if details.get(part)
    ]
    chosen = f"chosen with seed {seed} from {held_out:,} that were neither calibrated nor trained on"
    yield f"- Measured on images {chosen}: {', '.join(counts)}."
    skipped = details["images"].get("skipped")
    if skipped:
        yield f"- Files left out because they cannot be read: {skipped:,}."
    copies = details["images"].get("copies")
    if copies:
        yield f"- Copies of held-out images that were left out of calibration and training: {copies:,}."
    absent = (details.get("quality") or {}).get("absent_classes")
    if absent:
        shown = ", ".join(map(code, absent[:3])) + (", ..." if len(absent) > 3 else "")
        yield f"- Classes of the model without a held-out image: {len(absent):,} ({shown})."
    yield ""


def _commands(subject: Subject) -> Iterator[str]:
    environment = subject.document["environment"]
    yield f"All figures were measured by the run that made the files, on {environment['device']}"
    yield f"({environment['platform']}); `report.json` has them in full. This checks every file, measures"
    yield "them again and compares:"
    yield ""
    yield f"    compress verify {subject.target} --against {subject.original}"
    yield ""
    if subject.is_local:
        yield f"where {code(subject.source)} is the folder of the original."
        yield ""


def _number(value: float) -> str:
    """Write counts in full, other figures with five digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def gates(subject: Subject) -> Iterator[str]:
    """Yield the section of what the recipe required, or nothing."""
    rows = subject.document["gates"]
    if not rows:
        return
    yield from ("## What the recipe required", "")
    cells = (
        (
            code(gate["metric"]),
            gate["expected"],
            "not measured" if gate["measured"] is None else _number(gate["measured"]),
            "yes" if gate["passed"] else "**no**",
        )
        for gate in rows
    )
    yield from table(("metric", "required", "measured", "holds"), cells)
