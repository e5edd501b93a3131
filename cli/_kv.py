"""What stages that compressed the key-value cache say of it, and how the result decodes: for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..exporters.kv_table import (
    break_even_told,
    cache_of,
    init_told,
    kv_stages,
    layer_table,
    operations,
    passkey_rows,
    ranks_told,
    removed_told,
    skipped_told,
    stored_told,
)
from ._tables import Section, Table
from ._units import size

Document = Mapping[str, Any]

_MOST_ROWS = 16


def sections(document: Document) -> Iterator[Section]:
    """Yield what every stage that compressed the cache came to.

    Args:
        document: a report; nothing is yielded where no stage did so.
    """
    for stage in kv_stages(document):
        yield from _stage(stage)


def _stage(stage: Document) -> Iterator[Section]:
    cache, method = cache_of(stage), stage["method"]
    layers = cache["layers"]
    yield f"{method}: {ranks_told(layers)}; {stored_told(cache)}"
    yield f"{method}: removed {removed_told(cache)}; factors: {init_told(cache)}"
    yield from (f"{method}: {line}" for line in costs(cache))
    if len(layers) <= _MOST_ROWS:
        yield Table(
            f"{method}: ranks, and shares of the variance that they discard",
            *layer_table(layers),
        )
    for why, names in skipped_told(cache):
        yield f"{method}: not compressed: {', '.join(names)}: {why}"


def costs(cache: Document) -> Iterator[str]:
    """Yield what is saved, what is paid for it once, and what every token pays.

    Args:
        cache: of `kv_table.cache_of`.
    """
    per_token = cache["bytes_per_token"]
    before, after, metadata = per_token["before"], per_token["after"], per_token["metadata"]
    counted = f", {size(metadata)} of them scales and offsets" if metadata else ""
    yield f"{size(before)} -> {size(after)} of cache per token ({after / before:.1%}{counted})"
    if cache["at_context"]:
        yield f"one sequence of {cache['at_context']['tokens']:,} tokens: {_whole(cache['at_context'])}"
    window = f"the window adds {size(cache['window_bytes'])} per sequence" if cache["window"] else "no window"
    yield f"{window}; the factors take {size(cache['factor_bytes'])}"
    yield _pays_off(cache)
    rebuild = cache["rebuild_flops"]
    yield (
        f"keys and values are rebuilt for every decoded token: {operations(rebuild['per_token'])} behind"
        f" {rebuild['tokens']:,} tokens"
    )


def _whole(told: Document) -> str:
    """Write the whole cache of one sequence, before and after, without the factors and with them."""
    before, after, both = told["before"], told["after"], told["with_factors"]
    return (
        f"{size(before)} -> {size(after)} of cache, window counted ({after / before:.1%});"
        f" {size(both)} with the factors ({both / before:.1%})"
    )


def _pays_off(cache: Document) -> str:
    one, tokens = break_even_told(cache), cache["break_even_tokens"]
    if one is None:
        return "one sequence never pays off: window and factors take more than is saved"
    return f"one sequence pays off from {one}; the factors alone, over all sequences, from {tokens:,}"


def decoded(evaluation: Document) -> Iterator[str]:
    """Yield how the result does token by token; nothing where its cache is not compressed."""
    text, found = evaluation.get("text") or {}, evaluation.get("decoding")
    if "note" in text:
        yield f"note: kl and perplexity: {text['note']}"
    if not found:
        return
    if "skipped" in found:
        yield f"note: decoding: {found['skipped']}"
        return
    metrics = evaluation["metrics"]
    yield (
        f"decoding through the cache: perplexity {metrics['decode_perplexity']:.4f}, of the original"
        f" {metrics['decode_perplexity_original']:.4f} ({metrics['decode_perplexity_increase']:+.2%}), of the"
        f" result with a plain cache {metrics['decode_perplexity_one_pass']:.4f}, on"
        f" {found['tokens']:,} tokens behind prompts of {found['prompt']};"
        f" {found['compressed_share']:.0%} of what they read came out of the compressed cache"
    )
    for length, texts, before, after in passkey_rows(found):
        result = "" if after is None else f", the result {after}"
        yield f"hidden numbers, {length:,} tokens: the original finds {before} of {texts}{result}"
    note = (found.get("passkey") or {}).get("note")
    if note:
        yield f"note: hidden numbers: {note}"


def of_folder(cache: Document) -> Iterator[tuple[str, str]]:
    """Yield (what it is, value) of a checkpoint's compressed cache, as `inspect` tells it."""
    per_token = cache["bytes_per_token"]
    share = f"{per_token['after'] / per_token['before']:.1%}"
    yield "KV cache", f"{ranks_told(cache['layers'])}; {stored_told(cache)}"
    yield "KV cache, bytes per token", f"{size(per_token['before'])} -> {size(per_token['after'])} ({share})"
    if cache["at_context"]:
        yield f"KV cache of {cache['at_context']['tokens']:,} tokens", _whole(cache["at_context"])
    yield "KV cache, factors", f"{size(cache['factor_bytes'])}; {_pays_off(cache)}"
