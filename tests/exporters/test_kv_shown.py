"""What cards and pictures tell of a compressed key-value cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
from compress.evaluation.evaluator import Evaluation
from compress.exporters.card import render_card
from compress.exporters.drawing import plain_defaults
from compress.exporters.figures import DECODING, SINGULAR_VALUES, write_figures
from compress.exporters.figures_kv import draw_decoding, draw_singular_values
from compress.exporters.kv_table import kv_stages, operations, ranks_told, share
from compress.history import kept_in_history
from PIL import Image

from .. import told_cache as told


def section_of(document):
    """Return the card's section on the cache, lines joined as Markdown joins them."""
    found = render_card(document, [], "").split("## The compressed key-value cache\n")[1]
    return found.split("\n## ")[0]


def flat(text):
    return " ".join(text.split())


@pytest.fixture
def compressed(document):
    """Return `compressed(details, **evaluation)` -> the card's section."""
    return lambda details, **evaluation: section_of(told.told_in(document, details, **evaluation))


def test_ranks_are_told_in_a_few_words():
    assert ranks_told([told.layer(0)]) == "keys at rank 8 and values at rank 16 of 32, in 1 layer"
    many = [told.layer(number, 4 + number, 16) for number in range(6)]
    assert ranks_told(many) == "keys at rank 4 to 9 and values at rank 16 of 32, in 6 layers"


def test_operations_and_small_shares():
    assert operations(2 * 32_768 * 32 * 1600 * 4096) == "13.7 TFLOP"
    assert (operations(999), operations(1.5e6), operations(2e15)) == ("999 FLOP", "1.5 MFLOP", "2 PFLOP")
    assert (share(0.1234), share(1e-4), share(2.4e-7), share(5e-17), share(None)) == (
        "12.34%", "0.01%", "< 0.01%", "0.00%", "",
    )  # fmt: skip


def test_what_another_method_tells_under_this_name_is_no_cache():
    stages = [{"details": {"kv_cache": {"window": 4}}}, {"details": None}, {}, {"details": {"kv_cache": 3}}]
    assert kv_stages({"stages": stages}) == []


def test_the_card_tells_what_is_kept_saved_and_paid(compressed):
    section = compressed(told.cache())
    text = flat(section)
    assert (
        "By `cskv` (CSKV, arXiv 2409.10593): keys at rank 8 and values at rank 16 of 32, in 3 layers" in text
    )
    assert "Removed are 75.00% of the channels of keys and 50.00% of those of values." in text
    assert "closed-form optimum on the calibration text (whitened SVD); calibrated on 4,096 tokens" in text
    for row in (
        "| bytes of the cache per token, all layers | 768 | **288** (37.5%) |",
        "| of these, scales and offsets of packed numbers |  | 0 |",
        "| window: exact keys and values of 32 tokens, once per sequence |  | 24,576 |",
        "| factors, once |  | 27,648 (6,912 parameters) |",
        "| bytes of the cache of one sequence of 512 tokens, window counted | 393,216 | 174,080 (44.3%) |",
        "| the same with the factors |  | 201,728 (51.3%) |",
        "| one sequence takes less from, window and factors counted |  | 110 cached tokens on |",
        "| what is saved exceeds the factors alone from, over all sequences together |  |"
        " 58 cached tokens on |",
        "| rebuilding keys and values, per decoded token behind 512 | none | 2.36 MFLOP |",
        "| `model.layers.1.self_attn` | 8 of 32 | 1.23% | 16 of 32 | 25.00% |",
    ):
        assert row in section, row
    assert "<details>" not in section


def test_errors_with_rounding_are_columns_where_there_are_any(compressed):
    assert "error with rounding" not in compressed(told.cache())
    plain = told.layer(0) | {"mse_k_rounded": 0.625, "mse_v_rounded": 0.3125}
    trained = told.layer(1) | {"mse_k_rounded": 0.75, "mse_k_trained": 0.55, "mse_v_rounded": None}
    section = compressed(told.cache(bits=4, layers=2) | {"layers": [plain, trained]})
    error = "error with rounding (without)"
    assert f"| rank of keys | discarded | {error} | rank of values | discarded | {error} |" in section
    assert "| 8 of 32 | 1.23% | 0.625 (0.5) | 16 of 32 | 25.00% | 0.312 (0.25) |" in section
    assert "| 8 of 32 | 1.23% | 0.75 (0.55) | 16 of 32 | 25.00% |  |" in section


def test_the_card_says_what_is_not_claimed(compressed):
    text = flat(compressed(told.cache()))
    assert "**The cache is smaller only when the checkpoint is loaded with `compress`**" in text
    assert "No serving engine runs it" in text and "assisted decoding" in text
    assert "long texts decode more slowly, not faster" in text


def test_what_it_does_not_speed_up_names_the_rebuilding(document):
    assert "keys and values are rebuilt for every token" in render_card(
        told.told_in(document, told.cache()), [], ""
    )


def test_metadata_is_counted_and_a_cache_that_never_pays_off_is_told(compressed):
    per_token = {"before": 768.0, "after": 75.25, "metadata": 39.0}
    never = {"break_even_tokens_one": None, "break_even_tokens": None}
    section = compressed(told.cache(bits=4, bytes_per_token=per_token, **never))
    assert "| 768 | **75.25** (9.8%) |" in section and "packed numbers |  | 39 |" in section
    assert "together |  | never |" in section and "factors counted |  | never |" in section
    assert "packed to 4 bits" in section


def test_long_tables_are_folded_and_plain_layers_named(compressed):
    skipped = [{"name": f"model.layers.{number}.self_attn", "why": told.WHY} for number in (14, 15)]
    section = compressed(told.cache(layers=14, skipped=skipped))
    assert "<details><summary>14 attentions</summary>" in section and "</details>" in section
    assert f"`model.layers.14.self_attn`, `model.layers.15.self_attn`: {told.WHY}." in section


def test_decoding_is_held_against_the_original(compressed):
    section = compressed(told.cache(), passkey=told.PASSKEY)
    assert "| perplexity of decoding | 3.5000 | **3.6050** (+3.00%) |" in section
    assert "the first 8 tokens were read in one pass" in flat(section) and "896 tokens in all" in flat(
        section
    )
    assert "| hidden numbers found again, texts of 2,048 tokens | 8 of 10 | 5 of 10 |" in section
    none = {"original": [{"length": 1024, "samples": 10, "found": 0}], "note": "nothing can be said"}
    section = compressed(told.cache(), passkey=none)
    assert "| 0 of 10 |  |" in section and "Of hidden numbers: nothing can be said." in section


def test_without_decoding_nothing_is_claimed_of_it(document):
    report = told.told_in(document, told.cache())
    report["evaluation"]["decoding"] = {"skipped": "this form has no compressed cache"}
    for name in [name for name in report["evaluation"]["metrics"] if name.startswith("decode")]:
        del report["evaluation"]["metrics"][name]
    section = section_of(report)
    assert "No decoding was measured: this form has no compressed cache." in section
    assert "perplexity of decoding" not in section
    del report["evaluation"]["decoding"]
    assert "decoding was measured" not in section_of(report).lower()


def test_the_table_of_costs_has_the_cache_and_says_what_one_pass_is(document):
    card = render_card(told.told_in(document, told.cache()), [], "")
    costs = card.split("## What it costs, what it saves")[1].split("\n## ")[0]
    assert "| KV cache, bytes per token | 768 | 288 (37.5%) |" in costs
    assert (
        "| bytes of the cache of one sequence of 512 tokens, window counted | 393,216 | 174,080 (44.3%)"
        in costs
    )
    title = flat(card.split("\n## ")[0])
    assert "takes 288 B per token instead of 768 B: **0.375** of the original's." in title
    assert (
        "One sequence of 512 tokens takes 174 kB instead of 393 kB, the exact window counted: **0.443**."
        " The factors take 27.6 kB besides, once." in title
    )
    assert "| perplexity on text that was not calibrated on, read in one pass | 4.0000 | 4.0000 |" in costs
    assert "| perplexity of the same text, token by token through the cache | 3.5000 | 3.6050 |" in costs
    assert "One pass says nothing of the cache." in costs


def test_other_cards_say_nothing_of_a_cache(document):
    card = render_card(document, [], "")
    assert "cache" not in card


def drawn(draw, *arguments):
    with plain_defaults():
        figure = draw(*arguments)
        figure.canvas.draw()
    return figure


def test_singular_values_stand_at_their_numbers_with_the_ranks_marked():
    figure = drawn(draw_singular_values, told.cache())
    keys, values, bar = figure.axes
    curve = keys.lines[0]
    assert list(curve.get_xdata()) == list(range(1, 33)) and curve.get_ydata()[3] == 0.125
    assert [line.get_xdata()[0] for line in keys.lines if line.get_marker() == "o"] == [8, 8, 8]
    assert [line.get_xdata()[0] for line in values.lines if line.get_marker() == "o"] == [16, 16, 16]
    assert [text.get_text() for axes in (keys, values) for text in axes.texts] == ["rank 8", "rank 16"]
    assert keys.get_yscale() == "log" and "layer" in bar.get_ylabel()


def test_some_singular_values_of_many_stand_where_they_are_and_ranks_differ():
    cache = told.cache(layers=2)
    cache["layers"] = [told.layer(0, 100, 200), told.layer(1, 300, 200)]
    cache["singular_values"] = [told.spread(number, of=64) | {"of": 1024} for number in range(2)]
    keys, *_ = drawn(draw_singular_values, cache).axes
    places = keys.lines[0].get_xdata()
    assert (places[0], places[1], places[-1]) == (1, 17, 1024)
    assert keys.texts[0].get_text() == "ranks 100 to 300"


def test_the_loss_is_drawn_by_distance_with_its_difference_and_the_window():
    upper, lower = drawn(draw_decoding, told.decoding(), 32).axes
    before, after = upper.lines[0].get_ydata(), upper.lines[1].get_ydata()
    assert np.allclose([bar.get_height() for bar in lower.patches], after - before)
    assert list(upper.lines[0].get_xdata()[:2]) == [8.5, 22.5]
    assert upper.lines[2].get_xdata()[0] == 24.5  # 32 tokens, of which 8 are the prompt
    assert "beyond the window" in [text.get_text() for text in upper.texts]
    assert not drawn(draw_decoding, told.decoding(), 8).axes[0].texts


def test_pictures_are_written_where_there_is_something_to_draw(tmp_path, document):
    report = told.told_in(document, told.cache())
    evaluation = Evaluation(metrics=report["evaluation"]["metrics"])
    assert write_figures(tmp_path, evaluation, report) == [SINGULAR_VALUES, DECODING]
    for name in (SINGULAR_VALUES, DECODING):
        with Image.open(tmp_path / name) as picture:
            assert 600 < picture.width < 1200
    (tmp_path / "again").mkdir()
    write_figures(tmp_path / "again", evaluation, report)
    assert (tmp_path / SINGULAR_VALUES).read_bytes() == (tmp_path / "again" / SINGULAR_VALUES).read_bytes()
    report["evaluation"]["decoding"] = {"skipped": "none"}
    (tmp_path / "other").mkdir()
    assert write_figures(tmp_path / "other", evaluation, report) == [SINGULAR_VALUES]
    card = render_card(report, [SINGULAR_VALUES, DECODING], "")
    assert f"]({SINGULAR_VALUES})" in card and f"]({DECODING})" in card


def test_spectra_stay_out_of_the_history():
    kept = kept_in_history(json.loads(json.dumps({"kv_cache": told.cache()})))
    assert "singular_values" not in kept["kv_cache"] and "layers" not in kept["kv_cache"]
    assert kept["kv_cache"]["bytes_per_token"]["before"] == 768.0
