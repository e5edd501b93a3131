"""Predict a quantization stage from shapes: tensors, bytes, memory, and what stays in floating point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from ...models.base import LinearSite, ModelSpec, TensorSpec
from ...recipes.stages import GridSettings, UniformSettings
from ...runtime.linear import tensor_shapes
from ...runtime.manifest import QuantizedModule
from ...runtime.windows import kernel_of
from ..base import StagePlan
from .details import averages, label, layer_row
from .inputs import GRAM_BUDGET_BYTES, row_bytes
from .scheme import Choice, choose, options_of

# What rounding one layer holds beside its own float32 weight: the transformed weight, integers,
# and the search's temporaries.
WORKING_COPIES = 6


def planned_tensors(spec: ModelSpec, choices: Sequence[Choice]) -> dict[str, TensorSpec]:
    """Return the tensors after the stage, each layer's at the place of its weight.

    Args:
        spec: with a linear for every matrix that can have one; see `ModelSpec.split`.
        choices: of all linears.
    """
    schemes = {choice.site.name: choice.scheme for choice in choices if choice.scheme is not None}
    tensors: dict[str, TensorSpec] = {}
    for name, tensor in spec.tensors.items():
        module, _, attribute = name.rpartition(".")
        scheme = schemes.get(module)
        if scheme is None:
            tensors[name] = tensor
        elif attribute == "weight":
            for key, (shape, dtype) in tensor_shapes(scheme, spec.dtype).items():
                tensors[f"{module}.{key}"] = TensorSpec(shape, dtype)
    return spec.family.fused_tensors(tensors, schemes)


def gram_bytes(sites: Iterable[LinearSite]) -> int:
    """What Gram matrices of layers take: those of a block lie in memory together, however large they are."""
    blocks: dict[int | None, int] = {}
    for site in sites:
        if site.role != "adaln":
            blocks[site.block] = blocks.get(site.block, 0) + 4 * site.shape[1] ** 2
    return max(GRAM_BUDGET_BYTES, *blocks.values())


def _peak_bytes(spec: ModelSpec, choices: Sequence[Choice], compensate: bool) -> int:
    """Weights, calibration samples, and the work on the largest layer."""
    sites = [choice.site for choice in choices if choice.scheme is not None]
    largest = max(prod(site.shape) for site in sites)
    widest = max(site.shape[1] for site in sites)
    work = WORKING_COPIES * 4 * largest + row_bytes({site.name: site.shape[1] for site in sites})
    if compensate:
        work += gram_bytes(sites) + 4 * 4 * widest * widest
    return spec.size().bytes + work


def _notes(
    choices: Sequence[Choice],
    settings: UniformSettings,
    rows: Sequence[dict[str, Any]],
    shared: Mapping[str, str],
) -> list[str]:
    facts = averages(rows, label(settings), shared)
    mean = facts["average_bits"]
    notes = [
        f"{facts['label']}: {mean['quantized']} bits per weight on average over the quantized layers,"
        f" {mean['all_linears']} over all linear layers"
    ]
    return notes + left_in_floating_point(choices) + transform_notes(settings)


def left_in_floating_point(choices: Sequence[Choice]) -> list[str]:
    """Say which layers stay in floating point, and by which rule."""
    by_rule: dict[str, list[str]] = {}
    for choice in choices:
        if choice.scheme is None:
            by_rule.setdefault(choice.decided_by, []).append(choice.site.name)
    return [f"left in floating point ({rule}): {_few(names)}" for rule, names in by_rule.items()]


def transform_notes(settings: GridSettings) -> list[str]:
    """Say which transforms are decided on data, and how they are counted."""
    notes = []
    options = options_of(settings)
    if options.act_exponent == "sweep":
        notes.append(
            "channel scales are decided on calibration data; those that no producer absorbs are counted for"
            " every layer that may need one"
        )
    if options.rotation == "auto":
        notes.append("rotation is decided on calibration data; its signs are counted for every layer")
    if settings.activation_scale == "static":
        notes.append(
            "activation scales are static: found on calibration data once all weights are rounded; what lies"
            " outside a range takes its end"
        )
    return notes


def first_token_notes(settings: GridSettings, schemes: Mapping[str, QuantizedModule]) -> list[str]:
    """Say which layers may store their output for the first token, and what decides.

    Args:
        settings: of the stage.
        schemes: layer name -> planned scheme, of the quantized layers.
    """
    count = sum(scheme.first_token is not None for scheme in schemes.values())
    if not count:
        return []
    if settings.first_token == "store":
        note = "; refused when the recorded prompts turn out to have several"
    else:
        note = " if the recorded prompts have one; counted as if they had"
    return [f"{count} layers store their output for the text's first token in floating point{note}"]


def convolution_notes(
    module: nn.Module, schemes: Mapping[str, QuantizedModule], group_size: int | None
) -> list[str]:
    """Say what quantizing does to convolutions, and to which it does nothing.

    Args:
        module: dense, with or without weights.
        schemes: layer name -> scheme, of the quantized layers.
        group_size: of the stage's weights.
    """
    found = {name: scheme for name, scheme in schemes.items() if scheme.kernel is not None}
    notes = []
    silent = [name for name, scheme in found.items() if scheme.activation is None]
    if silent:
        notes.append(
            f"{len(silent)} convolutions keep their activations in floating point ({_few(silent)}): they"
            " become smaller, not faster"
        )
    if len(found) > len(silent):
        notes.append(
            f"{len(found) - len(silent)} convolutions are computed in integers: faster where oneDNN has a"
            " kernel for them (x86 CPUs, one scale per output channel); elsewhere window by window, which"
            " makes them smaller, not faster"
        )
    whole = [name for name, scheme in found.items() if group_size and not scheme.group_size]
    if whole:
        notes.append(
            f"group_size {group_size} does not divide the windows of {len(whole)} convolutions"
            f" ({_few(whole)}): they have one scale per output channel"
        )
    others = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Conv2d) and kernel_of(child) is None
    ]
    if others:
        notes.append(
            f"left in floating point (convolutions of several groups, or padded with more than zeros):"
            f" {_few(others)}"
        )
    return notes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plan_stage(spec: ModelSpec, settings: UniformSettings) -> StagePlan:
    """Predict a stage of any of the quantization methods.

    Raises:
        PlanError: see `scheme.choose`.
    """
    module, spec = spec.family.split(spec.meta_module()), spec.split()
    choices, _ = choose(spec.family, module, settings, spec.quantization)
    schemes = {choice.site.name: choice.scheme for choice in choices if choice.scheme is not None}
    after = spec.evolve(tensors=planned_tensors(spec, choices), quantization=schemes)
    rows = [layer_row(choice, choice.scheme, spec.dtype) for choice in choices]
    return StagePlan(
        method=settings.method,
        before=spec.size(),
        after=after.size(),
        spec=after,
        peak_memory_bytes=_peak_bytes(spec, choices, options_of(settings).compensate),
        notes=[
            *_notes(choices, settings, rows, spec.shared),
            *first_token_notes(settings, schemes),
            *convolution_notes(module, schemes, settings.group_size),
            *spec.family.beside_linears(module),
        ],
        layers=rows,
    )
