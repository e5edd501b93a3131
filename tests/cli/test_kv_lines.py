"""What a compressed key-value cache shows on a terminal, in a job summary, and in `inspect`."""

from __future__ import annotations

import pytest
from compress.cli import _render
from compress.cli._inspection import sections as inspected
from compress.cli._tables import to_markdown, to_plain
from compress.exporters.formats import write
from compress.exporters.inspection import inspect

from .. import told_cache as told
from ..tiny_cache import save_llama, with_cache


def lines(document):
    text = "\n".join(to_plain(section) for section in _render.report(document))
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.fixture
def shown(report):
    """Return `shown(details, **evaluation)` -> lines of a report."""
    return lambda details, **evaluation: lines(told.told_in(report, details, **evaluation))


def test_what_is_kept_saved_and_paid(shown):
    found = shown(told.cache())
    for line in (
        "cskv: keys at rank 8 and values at rank 16 of 32, in 3 layers; window of 32 tokens (sliding), in"
        " floating point",
        "cskv: removed 75.00% of the channels of keys and 50.00% of those of values; factors: closed-form"
        " optimum on the calibration text (whitened SVD)",
        "cskv: 768 B -> 288 B of cache per token (37.5%)",
        "cskv: one sequence of 512 tokens: 393 kB -> 174 kB of cache, window counted (44.3%); 202 kB with the"
        " factors (51.3%)",
        "cskv: the window adds 24.6 kB per sequence; the factors take 27.6 kB",
        "cskv: one sequence pays off from 110 cached tokens on; the factors alone, over all sequences, from"
        " 58",
        "cskv: keys and values are rebuilt for every decoded token: 2.36 MFLOP behind 512 tokens",
        "model.layers.2.self_attn 8 of 32 1.23% 16 of 32 25.00%",
        "KV cache, bytes per token 768 B 288 B 0.375 x",
        "decode_perplexity_increase 0.03",
    ):
        assert line in found, line


def test_what_is_packed_is_told_with_its_scales(shown):
    per_token = {"before": 768.0, "after": 75.0, "metadata": 39.0}
    never = {"break_even_tokens_one": None, "break_even_tokens": None}
    found = shown(told.cache(bits=4, mode="block", bytes_per_token=per_token, **never))
    assert "cskv: 768 B -> 75 B of cache per token (9.8%, 39 B of them scales and offsets)" in found
    assert any("window of 32 tokens (block), packed to 4 bits" in line for line in found)
    assert "cskv: one sequence never pays off: window and factors take more than is saved" in found
    assert not any("pays off from" in line for line in found)
    late = shown(told.cache(break_even_tokens_one=513))
    assert any("pays off from 513 cached tokens on, beyond the 512 of its context;" in line for line in late)


def test_errors_with_rounding_stand_beside_the_ranks(shown):
    layers = [told.layer(0) | {"mse_k_rounded": 0.625, "mse_v_rounded": 0.375}]
    found = shown(told.cache(layers=1, bits=4) | {"layers": layers})
    assert "model.layers.0.self_attn 8 of 32 1.23% 0.625 (0.5) 16 of 32 25.00% 0.375 (0.25)" in found


def test_training_different_ranks_and_plain_layers_are_told(shown):
    layers = [told.layer(0, 4, 12), told.layer(1, 9, 20), told.layer(3)]
    skipped = [{"name": "model.layers.2.self_attn", "why": told.WHY}]
    training = {"steps": 2000, "lr": 5e-5}
    found = shown(told.cache(layers=3, init="asvd", training=training, skipped=skipped) | {"layers": layers})
    assert any(
        "keys at rank 4, 8, 9 and values at rank 12, 16, 20 of 32, in 3 layers" in line for line in found
    )
    assert any("(ASVD), then trained for 2,000 steps" in line for line in found)
    assert f"cskv: not compressed: model.layers.2.self_attn: {told.WHY}" in found


def test_many_layers_are_no_table(shown):
    found = shown(told.cache(layers=17))
    assert any("in 17 layers" in line for line in found) and not any("of 32 1.23%" in line for line in found)
    assert any("of 32 1.23%" in line for line in shown(told.cache(layers=16)))


def test_figures_of_one_pass_are_not_left_to_speak_for_the_cache(shown):
    found = shown(told.cache())
    assert f"note: kl and perplexity: {told.TEXT['note']}" in found
    assert (
        "decoding through the cache: perplexity 3.6050, of the original 3.5000 (+3.00%), of the result"
        " with a plain cache 3.5500, on 896 tokens behind prompts of 8; 75% of what they read"
        " came out of the compressed cache" in found
    )


def test_hidden_numbers(shown):
    found = shown(told.cache(), passkey=told.PASSKEY)
    assert "hidden numbers, 2,048 tokens: the original finds 8 of 10, the result 5" in found
    none = {"original": [{"length": 1024, "samples": 10, "found": 0}], "note": "nothing can be said"}
    found = shown(told.cache(), passkey=none)
    assert "hidden numbers, 1,024 tokens: the original finds 0 of 10" in found
    assert "note: hidden numbers: nothing can be said" in found


def test_a_form_without_the_cache_says_so(report):
    document = told.told_in(report, told.cache())
    document["evaluation"]["decoding"] = {"skipped": "this form has none"}
    assert "note: decoding: this form has none" in lines(document)


def test_the_job_summary_has_the_same(report):
    document = told.told_in(report, told.cache())
    text = "\n".join(to_markdown(section) for section in _render.report(document))
    assert "| model.layers.0.self_attn | 8 of 32 | 1.23% | 16 of 32 | 25.00% |" in text
    assert "| KV cache, bytes per token | 768 B | 288 B | 0.375 x |" in text


def test_other_reports_say_nothing_of_a_cache(report):
    assert not any("cache" in line for line in lines(report))


def test_inspect_tells_of_the_cache_of_a_folder_and_of_no_other(tmp_path):
    folder = tmp_path / "compressed"
    folder.mkdir()
    write(with_cache(save_llama(tmp_path / "tiny"), bits=4), folder, "compress")
    head = [" ".join(line.split()) for line in to_plain(next(inspected(inspect(folder)))).splitlines()]
    kept = "keys at rank 3, 4 and values at rank 5, 6 of 32, in 2 layers; window of 4 tokens (sliding)"
    assert f"KV cache {kept}, packed to 4 bits" in head
    assert any(line.startswith("KV cache, bytes per token 512 B -> ") for line in head)
    assert any(line.startswith("KV cache of 128 tokens 65.5 kB -> ") for line in head)
    assert any(line.startswith("KV cache, factors 6.91 kB; one sequence pays off from ") for line in head)
    assert "KV cache" not in to_plain(next(inspected(inspect(tmp_path / "tiny"))))
