"""Which class implements which method: an explicit list, and entry points of other packages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import PlanError
from .base import Compressor

ENTRY_POINT_GROUP = "compress.compressors"
METHODS: Mapping[str, tuple[str, str]] = {
    "isomorphic": (".pruning.isomorphic", "Isomorphic"),
    "tinyfusion": (".pruning.tinyfusion", "TinyFusion"),
    "depth": (".pruning.depth", "Depth"),
    "eep": (".pruning.eep", "Eep"),
    "slimsam": (".pruning.slimsam", "SlimSam"),
    "finetune": (".recovery.finetune", "Finetune"),
    "distill": (".recovery.distill", "Distill"),
    "rtn": (".quantization.rtn", "Rtn"),
    "smoothquant": (".quantization.smoothquant", "SmoothQuant"),
    "vidit_q": (".quantization.vidit_q", "ViditQ"),
    "mixdq": (".quantization.mixdq", "Mixdq"),
    "cskv": (".kv_cache.cskv", "Cskv"),
}


def _foreign() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def names() -> list[str]:
    """Return the names of all methods, ours first."""
    return [*METHODS, *sorted(set(_foreign()) - set(METHODS))]


def get(method: str) -> Compressor[Any]:
    """Return the method called `method`; its module is imported now.

    Raises:
        PlanError: no such method.
    """
    if method in METHODS:
        module, attribute = METHODS[method]
        made: Compressor[Any] = getattr(import_module(module, __package__), attribute)()
        return made
    point = _foreign().get(method)
    if point is None:
        near = difflib.get_close_matches(method, names(), n=1)
        known = f"known methods: {', '.join(names())}"
        raise PlanError(f"{method}: no such method", hint=f"did you mean {near[0]}?" if near else known)
    found: Compressor[Any] = point.load()()
    return found
