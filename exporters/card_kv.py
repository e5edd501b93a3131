"""The card's account of a compressed key-value cache: what it saves, what it costs, what is not claimed."""

from __future__ import annotations

from collections.abc import Iterator

from .card_subject import Subject
from .kv_table import (
    Document,
    break_even_told,
    cache_of,
    decoding_of,
    init_told,
    kv_stages,
    layer_table,
    operations,
    passkey_rows,
    ranks_told,
    removed_told,
    skipped_told,
    stored_told,
    whole_cache_row,
)
from .markdown import code, table

_FOLDED = 12  # rows of a table from which on it is folded


def compressed_cache(subject: Subject) -> Iterator[str]:
    """Yield the section on the key-value cache, or nothing where no stage compressed it."""
    found = kv_stages(subject.document)
    if not found:
        return
    yield from ("## The compressed key-value cache", "")
    for stage in found:
        yield from _what(stage)
        yield from _costs(cache_of(stage))
        yield from _layers(cache_of(stage))
    yield from _decoding(subject)
    yield from _limits()


def _what(stage: Document) -> Iterator[str]:
    cache = cache_of(stage)
    yield f"By {code(stage['method'])} (CSKV, arXiv 2409.10593): {ranks_told(cache['layers'])};"
    yield f"{stored_told(cache)}. Removed are {removed_told(cache)}."
    yield f"The factors: {init_told(cache)}; calibrated on {cache['calibration_tokens']:,} tokens."
    yield "The stage leaves the model's own weights as they are. The cache keeps a few channels of every"
    yield "token in the place of its keys and values; these are rebuilt when the next token is decoded."
    yield ""


def _costs(cache: Document) -> Iterator[str]:
    per_token, tokens, whole = cache["bytes_per_token"], cache["break_even_tokens"], cache["at_context"]
    before, after = per_token["before"], per_token["after"]
    rows = [
        (
            "bytes of the cache per token, all layers",
            _bytes(before),
            f"**{_bytes(after)}** ({after / before:.1%})",
        ),
        whole_cache_row(whole),
        ("the same with the factors", "",
         f"{whole['with_factors']:,} ({whole['with_factors'] / whole['before']:.1%})"),
        ("of these, scales and offsets of packed numbers", "", _bytes(per_token["metadata"])),
        (f"window: exact keys and values of {cache['window']} tokens, once per sequence", "",
         f"{cache['window_bytes']:,}"),
        ("factors, once", "", f"{cache['factor_bytes']:,} ({cache['factor_parameters']:,} parameters)"),
        ("one sequence takes less from, window and factors counted", "", break_even_told(cache) or "never"),
        ("what is saved exceeds the factors alone from, over all sequences together", "",
         "never" if tokens is None else f"{tokens:,} cached tokens on"),
        (f"rebuilding keys and values, per decoded token behind {cache['rebuild_flops']['tokens']:,}", "none",
         operations(cache["rebuild_flops"]["per_token"])),
    ]  # fmt: skip
    yield from table(("", "original", "this checkpoint"), rows)


def _bytes(count: float) -> str:
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.2f}"


def _layers(cache: Document) -> Iterator[str]:
    header, rows = layer_table(cache["layers"])
    yield "Ranks, and the share of the variance of keys and values on the calibration text that they discard:"
    yield ""
    if len(rows) > _FOLDED:
        yield from (f"<details><summary>{len(rows)} attentions</summary>", "")
    yield from table(header, ((code(row[0]), *row[1:]) for row in rows))
    if len(rows) > _FOLDED:
        yield from ("</details>", "")
    for why, names in skipped_told(cache):
        yield f"Not compressed, their cache is a plain one: {', '.join(map(code, names))}: {why}."
        yield ""


def _decoding(subject: Subject) -> Iterator[str]:
    found = subject.document["evaluation"].get("decoding")
    if found and "skipped" in found:
        yield from (f"No decoding was measured: {found['skipped']}.", "")
    found = decoding_of(subject.document)
    if found is None:
        return
    metrics = subject.metrics
    yield f"Decoding was measured with the text's own tokens: of {found['samples']} sequences that were not"
    yield f"calibrated on, the first {found['prompt']} tokens were read in one pass, the others one by one"
    yield f"through this cache, {found['tokens']:,} tokens in all. Of what they read"
    yield f"{found['compressed_share']:.0%} came out of the compressed cache; the rest is kept exactly."
    yield "The original's figures are of one pass over the same sequences, which its own cache changes by"
    yield "roundings alone."
    yield ""
    rows = [
        ("perplexity of decoding", f"{metrics['decode_perplexity_original']:.4f}",
         f"**{metrics['decode_perplexity']:.4f}** ({metrics['decode_perplexity_increase']:+.2%})"),
        ("the same in one pass, with a plain cache", "", f"{metrics['decode_perplexity_one_pass']:.4f}"),
        ("divergence of the next token's distribution, nats", "0", f"{metrics['decode_kl']:.5f}"),
    ]  # fmt: skip
    for length, texts, before, after in passkey_rows(found):
        what = f"hidden numbers found again, texts of {length:,} tokens"
        rows.append((what, f"{before} of {texts}", "" if after is None else f"{after} of {texts}"))
    yield from table(("", "original", "this checkpoint"), rows)
    note = (found.get("passkey") or {}).get("note")
    if note:
        yield from (f"Of hidden numbers: {note}.", "")


def _limits() -> Iterator[str]:
    yield "What this does not do:"
    yield ""
    yield "- **The cache is smaller only when the checkpoint is loaded with `compress`**, or with code of its"
    yield "  own beside the weights where there is any. No serving engine runs it: engines lay out keys and"
    yield "  values themselves and keep them in full."
    yield "- It trades arithmetic for memory: what is rebuilt grows with the text, so long texts decode more"
    yield "  slowly, not faster."
    yield "- After a prompt that is read in one pass the first token is that of the same weights"
    yield "  with a plain cache. What is read in pieces, and every further token, goes through the compressed"
    yield "  cache."
    yield "- Exact keys and values that are gone do not come back: cropping the cache is refused, and with it"
    yield "  assisted decoding; so are the other kinds of `cache_implementation`, such as `static`. With"
    yield "  `compile_config` transformers warns that it will not compile, and decodes without."
    yield ""
