"""In which form a compressed key-value cache leaves: `export.kv_cache`, and what it goes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .export import ExportSettings

METHOD = "cskv"
"""The stage that compresses the cache."""
KvForm = Literal["adapter", "checkpoint", "custom"]


def kv_form(methods: Sequence[str], export: ExportSettings) -> KvForm | None:
    """Return how an export carries the compressed cache; None where the recipe compresses none.

    Args:
        methods: of the recipe's stages, in their order.
        export: one of its exports. Where it does not say, an adapter is written if the stages left the
            weights as they were, and else a checkpoint.
    """
    if METHOD not in methods:
        return None
    if export.kv_cache is not None:
        return export.kv_cache
    return "adapter" if export.format == "compress" and not _others(methods) else "checkpoint"


def kv_clash(
    methods: Sequence[str], exports: Sequence[ExportSettings]
) -> tuple[tuple[str | int, ...], str, str] | None:
    """Return (location below `export`, what is wrong, what to do) for a form that cannot be written."""
    for index, export in enumerate(exports):
        form, others = export.kv_cache, _others(methods)
        if form is None:
            continue
        where = (index, "kv_cache")
        if METHOD not in methods:
            return where, f"{form}: no stage compresses a cache", f"add the stage {METHOD}, or leave it out"
        if form == "adapter" and others:
            verb = "changes" if len(others) == 1 else "change"
            message = (
                f"adapter: it goes with the weights of the original, and {', '.join(others)} {verb} them"
            )
            return where, message, "use checkpoint, which holds the changed weights as well"
        if form != "checkpoint" and export.format != "compress":
            message = f"{form}: is written in the format compress, not in {export.format}"
            return where, message, "leave `format` out, or use checkpoint"
    return None


def _others(methods: Sequence[str]) -> list[str]:
    """Return the stages that change weights, each once."""
    return [method for method in dict.fromkeys(methods) if method != METHOD]
