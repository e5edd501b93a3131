"""What a compressed key-value cache comes to, in pieces for all who show it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..runtime.kv.sizes import operations
from .experts_table import spans

__all__ = [
    "KEY", "Document", "break_even_told", "cache_of", "decoding_of", "init_told", "kv_stages",
    "layer_table", "operations", "passkey_rows", "ranks_told", "removed_told", "share", "skipped_told",
    "stored_told", "whole_cache_row",
]  # fmt: skip

Document = Mapping[str, Any]

KEY = "kv_cache"
_INITS = {
    "whiten": "closed-form optimum on the calibration text (whitened SVD)",
    "asvd": "SVD scaled by the inputs' magnitudes (ASVD)",
    "svd": "SVD of the weights",
    "random": "random numbers",
}


def kv_stages(document: Document) -> list[Document]:
    """Return the stages that compressed the cache, in order."""
    return [stage for stage in document.get("stages", ()) if _tells(stage.get("details") or {})]


def _tells(details: Document) -> bool:
    # A manifest is anybody's, and other methods may have details of this name.
    found = details.get(KEY)
    return isinstance(found, Mapping) and isinstance(found.get("bytes_per_token"), Mapping)


def cache_of(stage: Document) -> Document:
    """Return what a stage of `kv_stages` tells."""
    found: Document = stage["details"][KEY]
    return found


def ranks_told(layers: Sequence[Document]) -> str:
    """Say what is kept: "keys at rank 6-8 and values at rank 10 of 32, in 5 layers".

    Args:
        layers: rows with `width`, `rank_k` and `rank_v`; at least one.
    """
    keys, values, widths = (_some({row[key] for row in layers}) for key in ("rank_k", "rank_v", "width"))
    where = f"in {len(layers)} layers" if len(layers) > 1 else "in 1 layer"
    return f"keys at rank {keys} and values at rank {values} of {widths}, {where}"


def _some(numbers: set[int]) -> str:
    """Write a few different numbers; of many the first and the last."""
    rising = sorted(numbers)
    return spans(rising) if len(rising) <= 4 else f"{rising[0]} to {rising[-1]}"


def stored_told(cache: Document) -> str:
    """Say how the cache keeps tokens: "window of 32 tokens (sliding), packed to 4 bits"."""
    window = f"window of {cache['window']} tokens ({cache['mode']})" if cache["window"] else "no window"
    bits = cache.get("bits")
    return f"{window}, {f'packed to {bits} bits' if bits else 'in floating point'}"


def init_told(cache: Document) -> str:
    """Say where the factors come from, and whether they were trained."""
    begun = _INITS.get(cache["init"], str(cache["init"]))
    trained = cache.get("training")
    return f"{begun}, then trained for {trained['steps']:,} steps" if trained else begun


def removed_told(cache: Document) -> str:
    """Say which share of the channels went, of keys and of values; ranks are whole numbers."""
    removed = cache["removed"]
    return f"{removed['k']:.2%} of the channels of keys and {removed['v']:.2%} of those of values"


def break_even_told(cache: Document) -> str | None:
    """Say from when on one sequence pays off, everything counted; None where it never does."""
    tokens, whole = cache["break_even_tokens_one"], cache["at_context"]
    if tokens is None:
        return None
    beyond = f", beyond the {whole['tokens']:,} of its context" if whole and tokens > whole["tokens"] else ""
    return f"{tokens:,} cached tokens on{beyond}"


def whole_cache_row(told: Document) -> tuple[str, str, str]:
    """Return the row of the whole cache of one sequence: what it is, before, after.

    Args:
        told: `at_context` of a stage.
    """
    before, after = told["before"], told["after"]
    what = f"bytes of the cache of one sequence of {told['tokens']:,} tokens, window counted"
    return what, f"{before:,}", f"{after:,} ({after / before:.1%})"


def layer_table(layers: Sequence[Document]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: rank and discarded share, of keys and of values.

    Where the cache is rounded, also the mean square error of what is rebuilt, with the rounding and without.
    """
    rounded = any(row.get("mse_k_rounded") is not None for row in layers)
    error = ["error with rounding (without)"] if rounded else []
    header = ["attention", "rank of keys", "discarded", *error, "rank of values", "discarded", *error]
    rows = []
    for row in layers:
        cells = [row["name"]]
        for side in "kv":
            cells += [f"{row[f'rank_{side}']} of {row['width']}", share(row[f"discarded_{side}"])]
            cells += [_errors(row, side)] if rounded else []
        rows.append(cells)
    return header, rows


def _errors(row: Document, side: str) -> str:
    """Write an error with rounding, and that without, of the factors that ship."""
    with_it, trained = row.get(f"mse_{side}_rounded"), row.get(f"mse_{side}_trained")
    without = row[f"mse_{side}"] if trained is None else trained
    return "" if with_it is None else f"{with_it:.3g} ({without:.3g})"


def share(value: float | None) -> str:
    """Write a share of the variance; empty where it was not measured."""
    if value is None:
        return ""
    # Where nothing is removed, sums in floating point leave a little.
    return "< 0.01%" if 1e-12 < value < 5e-5 else f"{value:.2%}"


def skipped_told(cache: Document) -> list[tuple[str, list[str]]]:
    """Return (reason, attentions) of the layers that keep a plain cache."""
    found: dict[str, list[str]] = {}
    for row in cache.get("skipped") or ():
        found.setdefault(row["why"], []).append(row["name"])
    return list(found.items())


def decoding_of(document: Document) -> Document | None:
    """Return what was measured token by token, or None."""
    found = document["evaluation"].get("decoding")
    return found if found and "by_distance" in found else None


def passkey_rows(decoding: Document) -> Iterator[tuple[int, int, int, int | None]]:
    """Yield (tokens, texts, found by the original, found by the result or None) of every length."""
    found = decoding.get("passkey") or {}
    after = {row["length"]: row["found"] for row in found.get("compressed") or ()}
    for row in found.get("original") or ():
        yield row["length"], row["samples"], row["found"], after.get(row["length"])
