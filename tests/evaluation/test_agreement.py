"""Figures that were measured again: what may differ, and what may not."""

from __future__ import annotations

import math

import pytest
from compress.evaluation.agreement import compare_metrics

RECORDED = {
    "size_ratio": 0.25, "bytes": 1000, "sqnr_db": 21.5, "psnr_db": 30.0, "ssim": 0.95, "max_abs_error": 0.0,
    "class_agreement": 0.92, "class_agreement_drop": 0.01, "fid": 4.0,
}  # fmt: skip


def compare(changes=None, samples=500, recorded=RECORDED):
    return compare_metrics(recorded, {**RECORDED, **(changes or {})}, quality_samples=samples)


def test_equal_figures_agree():
    found = compare()
    assert found.holds
    assert found.text == "9 measured again, all equal"
    assert [row.difference for row in found.rows] == [0.0] * 9


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [
        ("size_ratio", 0.25, 0.2500001),
        ("bytes", 1000, 1001),
        ("bytes", 1000, 999),
        ("sqnr_db", 21.9, 22.1),
        ("sqnr_db", 21.1, 20.9),
        ("psnr_db", 30.4, 30.6),
        ("ssim", 0.959, 0.961),
        ("max_abs_error", 0.0, 1e-9),
        ("class_agreement", 0.911, 0.909),
        ("class_agreement_drop", 0.029, 0.031),
        ("fid", 4.24, 4.26),
    ],
)
def test_a_difference_that_matters_is_one_in_either_direction(metric, near, far):
    assert compare({metric: near}).holds
    found = compare({metric: far})
    assert not found.holds
    assert [row.metric for row in found.rows if not row.agrees] == [metric]
    assert found.text.startswith(f"{metric} is ")
    assert ("must be equal" in found.text) == (metric in ("bytes", "size_ratio", "max_abs_error"))


def test_a_report_without_figures_proves_nothing():
    found = compare(recorded={})
    assert not found.holds
    assert found.text == "the report records no figures"


@pytest.mark.parametrize(
    ("metric", "near", "far"),
    [
        ("mask_agreement", 0.77, 0.75),
        ("miou", 0.83, 0.85),
        ("miou_original", 0.83, 0.85),
        ("miou_drop", 0.87, 0.89),
    ],
)
def test_masks_may_move_by_as_many_as_a_few_other_choices(metric, near, far):
    """16 images of 5 points: 80 masks; true masks are at least as many as their images, here 80."""

    def holds(measured):
        return compare_metrics(
            {metric: 0.8}, {metric: measured}, quality_samples=80, fidelity_samples=16, points=5
        ).holds

    assert holds(near) and not holds(far)


def test_few_samples_allow_for_a_few_of_them():
    assert compare({"class_agreement": 0.90}, samples=100).holds
    assert not compare({"class_agreement": 0.90}, samples=1000).holds


def test_the_closer_to_the_original_the_more_do_other_kernels_show():
    near = {"psnr_db": 49.829}
    assert compare({"psnr_db": 50.5103}, recorded=near).holds  # by other kernels alone, on the built-in DiT
    assert not compare({"psnr_db": 53.0}, recorded=near).holds
    assert not compare({"psnr_db": 47.0}, recorded=near).holds
    (row,) = compare(recorded={"psnr_db": 40.0}).rows
    assert row.tolerance == pytest.approx(20 * math.log10(1.1))
    (row,) = compare(recorded={"psnr_db": 20.0}).rows
    assert row.tolerance == 0.5


def test_beyond_sixty_decibels_only_rounding_is_left():
    for before, after in ((math.inf, math.inf), (math.inf, 61.0), (90.0, 70.0)):
        assert compare({"sqnr_db": after}, recorded={"sqnr_db": before}).holds
    assert not compare({"sqnr_db": 40.0}, recorded={"sqnr_db": math.inf}).holds


@pytest.mark.parametrize("value", [None, "21.5", True, [1]])
def test_what_is_recorded_must_be_a_number(value):
    found = compare(recorded={"sqnr_db": value})
    assert not found.holds
    assert found.text == "sqnr_db is recorded as something else than a number"


def test_what_is_not_a_number_never_agrees():
    assert not compare({"fid": math.nan}).holds
    assert not compare(recorded={"fid": math.nan}).holds


def test_a_recorded_figure_must_be_measured_again_and_a_new_one_says_nothing():
    found = compare(recorded={**RECORDED, "fid_original": 1.0})
    assert not found.holds
    assert found.text == "fid_original was not measured again"
    assert compare({"new": 1.0}).holds


def test_a_time_is_held_against_nothing():
    found = compare_metrics({"bytes": 5, "speedup": 2.0}, {"bytes": 5, "speedup": 1.0}, quality_samples=None)
    assert found.holds and [row.metric for row in found.rows] == ["bytes"]


def test_the_farthest_is_named():
    text = compare({"sqnr_db": 21.6, "ssim": 0.959}).text
    assert text.startswith(
        "9 measured again, 2 not to the last digit; farthest: ssim is 0.959, recorded 0.95"
    )


@pytest.mark.parametrize(
    ("name", "recorded", "near", "far"),
    [
        ("decode_perplexity", 4.0, 4.039, 4.041),
        ("decode_perplexity_original", 4.0, 3.961, 3.959),
        ("decode_perplexity_increase", 0.03, 0.0499, 0.0501),
        ("decode_kl", 0.01, 0.01209, 0.01211),
        ("kv_bytes_per_token", 480.0, 480.0, 480.5),
        ("passkey", 0.9, 0.826, 0.824),
        ("passkey_original", 1.0, 0.926, 0.924),
        ("passkey_drop", 0.1, 0.249, 0.251),
    ],
)
def test_figures_of_decoding_may_move_by_what_roundings_make_of_them(name, recorded, near, far):
    for measured, holds in ((near, True), (far, False)):
        found = compare_metrics({name: recorded}, {name: measured}, quality_samples=None, passkey_samples=40)
        assert found.holds is holds
