"""Layers of a few of the recorded calls: recorded for the original, compared for what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..models.base import OpenModel
from .call_store import to_device
from .layers import Powers, compare_layers, layer_rows, record_layers
from .reference import LAYERS, Reference

_CALLS = 4

Inputs = Callable[[OpenModel, Mapping[str, Any]], dict[str, Any]]
"""Returns what of a recorded call the layers are watched with, on the model's device."""


def whole_call(model: OpenModel, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return all of a call."""
    placed: dict[str, Any] = to_device(call, device_of(model))
    return placed


def device_of(model: OpenModel) -> torch.device:
    """Return where the model computes."""
    return next(model.module.parameters()).device


def record_watched(model: OpenModel, folder: Path, inputs: Inputs = whole_call) -> None:
    """Record the layers of calls that are evenly spread over those that `folder` holds.

    Args:
        model: the original.
        folder: of the recording; its calls are there.
        inputs: what of a call is used.
    """
    calls = Reference(folder, {}).calls()
    for index in sorted({int(place) for place in torch.linspace(0, len(calls) - 1, _CALLS).round()}):
        record_layers(model, inputs(model, calls[index][0]), folder / LAYERS / f"{index:05d}")


def compare_watched(
    model: OpenModel, reference: Reference, inputs: Inputs = whole_call
) -> list[dict[str, Any]]:
    """Return one row per block and watched linear, in forward order.

    Args:
        model: what became of the original.
        reference: with recorded layers.
        inputs: as they were recorded with.
    """
    sums: dict[str, Powers] = {}
    calls = reference.calls()
    for index, path in reference.layers().items():
        compare_layers(model, inputs(model, calls[index][0]), path, sums)
    return layer_rows(model, sums)
