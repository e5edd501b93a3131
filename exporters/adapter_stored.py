"""What is in the folder of an adapter of a compressed cache; its original is not looked at. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.headers import DTYPE_CODES, ITEM_BYTES
from ..runtime.kv.adapter import WEIGHTS_NAME, open_adapter
from ..runtime.kv.sizes import bytes_per_token, factor_parameters, full_bytes_per_token
from ..runtime.manifest import HistoryEntry
from .cache_stored import described_cache


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """Describe an adapter in the form of `inspection.inspect`, with `base` besides.

    Returns:
        A JSON value as that of a checkpoint without layers, whose `parameters` are the factors'; `class` is
        that of the original, and `base` has its `id`, `revision` and `subfolder`. The bytes per token
        of `kv_cache` are those of the attentions that it lists: what others keep only the original says.
        Its `at_context` is what the stage wrote down; None where it wrote none.

    Raises:
        SourceError: a file is missing, damaged or contradicts the other.
    """
    adapter = open_adapter(folder)
    document, size = adapter.document, (folder / WEIGHTS_NAME).stat().st_size
    scheme, item_bytes = document.scheme, ITEM_BYTES[DTYPE_CODES[document.dtype]]
    parameters = factor_parameters(scheme)
    per_token = {
        "before": full_bytes_per_token(scheme, item_bytes),
        "after": bytes_per_token(scheme, item_bytes),
    }
    return {
        "class": document.base.class_name,
        "format": "adapter",
        "base": document.base.model_dump(mode="json", include={"id", "revision", "subfolder"}),
        "dtype": document.dtype,
        "files": [{"name": WEIGHTS_NAME, "bytes": size}],
        "bytes": size,
        "tensor_bytes": adapter.bytes,
        "parameters": parameters,
        "parameters_stored": parameters,
        "bits_per_weight": round(8 * adapter.bytes / parameters, 4),
        "quantized_bits": None,
        "shared": 0,
        "cut": 0,
        "depth": {},
        "experts": None,
        "kv_cache": described_cache(
            scheme, per_token, item_bytes, adapter.bytes, _at_context(document.history)
        ),
        "layers": [],
        "history": [entry.model_dump(mode="json") for entry in document.history],
    }


def _at_context(history: Sequence[HistoryEntry]) -> dict[str, int] | None:
    """Return what the latest stage that compressed the cache told; details are anybody's and may be else."""
    for entry in reversed(history):
        told = entry.details.get("kv_cache")
        found = told.get("at_context") if isinstance(told, Mapping) else None
        if isinstance(found, Mapping):
            numbers = {
                key: number
                for key in ("tokens", "before", "after", "with_factors")
                if type(number := found.get(key)) is int and number > 0
            }
            if len(numbers) == 4:
                return numbers
    return None
