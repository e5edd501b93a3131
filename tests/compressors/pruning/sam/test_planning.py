"""What a plan says of slimming: real sizes from a config alone, bounds of global ranking, memory."""

from __future__ import annotations

import json
from math import prod

import pytest
import torch
from compress.compressors.pruning.sam.choosing import compete
from compress.compressors.pruning.sam.cutting import planned_surgery
from compress.compressors.pruning.sam.memory import aligning_bytes, scoring_bytes
from compress.compressors.pruning.sam.planning import plan_slimming, slim
from compress.models.base import flat_shapes
from compress.models.open import read_spec
from compress.models.sam_macs import encoder_macs, encoder_parameters
from compress.recipes.schema import ModelRef
from compress.recipes.slimsam import SlimSamSettings

from ....tiny_sam import TINY


def spec_of(folder, dtype="float32", **vision):
    """Return the spec of a config, without weights; without `vision` of SAM-B."""
    parts = {**TINY, "vision_config": {**TINY["vision_config"], **vision}} if vision else {}
    folder.mkdir(exist_ok=True)
    config = {"model_type": "sam", "architectures": ["SamModel"], **parts}
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(ModelRef(id=str(folder), dtype=dtype))


@pytest.fixture
def base(tmp_path):
    return spec_of(tmp_path / "sam-b")


@pytest.mark.parametrize(
    ("ratio", "width", "inner", "parameters", "encoder", "between", "linear_conv", "all_products"),
    [
        (0.5, 384, 1536, 27_962_032, 23_897_216, 45_209_472, 94.8, 152.2),
        (0.77, 168, 696, 9_723_784, 5_658_968, 20_199_912, 20.9, 46.0),
    ],
)
def test_the_real_model_has_the_sizes_of_the_paper(
    base, ratio, width, inner, parameters, encoder, between, linear_conv, all_products
):
    slimmed = slim(base, SlimSamSettings(ratio=ratio))
    assert base.parameters == 93_735_728 and slimmed.after.parameters == parameters
    assert slimmed.widths.embedding == width and set(slimmed.widths.head_dims) == {width // 12}
    assert set(slimmed.widths.inner) == {inner} and slimmed.largest is slimmed.smallest is slimmed.after
    shapes = flat_shapes(slimmed.after.surgery)
    assert encoder_parameters(base.config, shapes) == encoder
    assert encoder_parameters(base.config, flat_shapes(slimmed.between.surgery)) == between
    for products, expected in ((False, linear_conv), (True, all_products)):
        found = encoder_macs(base.config, shapes, attention_products=products) / 1e9
        assert round(found, 1) == expected
    assert base.family.native_config(base.config, slimmed.after.surgery)["vision_config"]["mlp_dim"] == inner
    assert base.family.native_config(base.config, slimmed.between.surgery) is None


def test_the_plan_of_the_real_model_tells_both_counts_of_work_and_what_it_takes(base):
    plan = plan_slimming(base, SlimSamSettings(ratio=0.5))
    assert plan.after.parameters == 27_962_032 and plan.least is None
    told = " ".join(plan.notes)
    for words in (
        "368.7 to 94.8 G",
        "483.6 to 152.2 G",
        "embedding 768 to 384",
        "heads 64 to 32",
        "20 epochs",
    ):
        assert words in told
    # Matrices of scores of 4096 x 4096 for 12 heads, 768 MiB each, of which three live at a time.
    assert 4 * 2**30 < plan.peak_memory_bytes < 7 * 2**30
    longer = plan_slimming(base, SlimSamSettings(ratio=0.5, recompute=False))
    assert longer.peak_memory_bytes > plan.peak_memory_bytes + 2**32
    assert plan.disk_bytes >= 2 * 3 * 4 * 45_209_472


def test_baselines_are_called_so(tmp_path):
    spec = spec_of(tmp_path / "tiny", hidden_size=48)
    one = plan_slimming(spec, SlimSamSettings(ratio=0.5, slimming="one_step", steps=7))
    assert any("baseline" in note and "14 steps" in note for note in one.notes)
    assert any("pruning" in note and "embedding pruning" not in note for note in one.notes)
    plain = plan_slimming(spec, SlimSamSettings(ratio=0.5, features=False))
    assert any("features: false is a baseline" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("ratio", "round_to"), [(0.3, None), (0.5, None), (0.77, None), (0.3, 1), (0.77, 1), (0.3, 7)]
)
def test_whatever_scores_say_a_global_model_is_between_the_planned_ones(tmp_path, ratio, round_to):
    spec = spec_of(tmp_path / "tiny", num_hidden_layers=4, global_attn_indexes=[1, 3])
    settings = SlimSamSettings(ratio=ratio, ranking="global", round_to=round_to)
    slimmed = slim(spec, settings)
    low, high = slimmed.smallest.size(), slimmed.largest.size()
    assert spec.family.native_config(spec.config, slimmed.largest.surgery) is None
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 5.0):
        for _ in range(10):
            loud = (spread * torch.randn(2, 4, generator=generator)).exp().double()
            heads = [scale * torch.rand(12, generator=generator).double() for scale in loud[0]]
            inner = [scale * torch.rand(96, generator=generator).double() for scale in loud[1]]
            one = 1 if round_to in (None, 1) else 7
            cut = planned_surgery(
                spec.config, slimmed.widths.embedding, compete(heads, ratio, one, "max"),
                compete(inner, ratio, round_to or 4, "mean"),
            )  # fmt: skip
            found = spec.cut(cut).size()
            assert low.parameters <= found.parameters <= high.parameters
            assert low.macs <= found.macs <= high.macs


def test_a_model_that_was_cut_before_is_cut_again(tmp_path):
    spec = spec_of(tmp_path / "tiny", hidden_size=48)
    once = slim(spec, SlimSamSettings(ratio=0.5)).after
    twice = slim(once, SlimSamSettings(ratio=0.5))
    assert twice.before_widths.embedding == 24 and twice.widths.embedding == 12
    assert set(twice.widths.head_dims) == {3} and set(twice.widths.inner) == {24}


def test_memory_counts_weights_sums_moments_and_what_else_is_there(tmp_path):
    spec = spec_of(tmp_path / "tiny", hidden_size=48)
    settings = SlimSamSettings(ratio=0.5, steps=1, batch_size=1)
    scored = sum(
        4 * prod(tensor.shape)
        for name, tensor in spec.tensors.items()
        if name.endswith(("qkv.weight", "proj.weight", "lin1.weight", "lin2.weight"))
        and name.startswith("vision_encoder.layers.")
    )
    stored = spec.size().bytes
    bottleneck = scoring_bytes(spec, settings, embedding=False, beside=1000)
    assert stored + scored < bottleneck
    assert scoring_bytes(spec, settings, embedding=False, beside=0) == bottleneck - 1000
    assert scoring_bytes(spec, settings, embedding=True, beside=1000) > bottleneck
    encoder = 4 * encoder_parameters(spec.config, {})
    beside = stored + 1000
    step = aligning_bytes(spec, [spec], "outputs", settings, beside=beside)
    assert step > beside + stored + 3 * encoder


def test_features_and_images_count_where_they_are_held(base):
    one = SlimSamSettings(ratio=0.5, steps=1, batch_size=1)
    four = SlimSamSettings(ratio=0.5, steps=1, batch_size=4, accumulate=1)
    plain = aligning_bytes(base, [base], "outputs", one, beside=0)
    inside = aligning_bytes(base, [base], "embedding", one, beside=0)
    # q, k and v of 8 layers with filled windows and 4 without, and 12 times the inner channels.
    features = 4 * ((8 * 70**2 + 4 * 64**2) * 3 * 768 + 12 * 64**2 * 3072)
    assert 0.8 * features < inside - plain < features  # those of the last layers are gone at the worst moment
    stream = aligning_bytes(base, [base, base], "bottleneck", one, beside=0)
    assert 0.5 * 25 * 64**2 * 768 * 4 < stream - plain < inside - plain
    together = aligning_bytes(base, [base], "outputs", four, beside=0)
    assert together > plain + 3 * 2 * 768 * 2**20  # of each further image two matrices of scores at least
    half = one.model_copy(update={"precision": "bfloat16"})
    assert aligning_bytes(base, [base], "embedding", half, beside=0) < 0.75 * inside


def test_half_precision_counts_as_it_is_stored_and_widened(tmp_path):
    wide = spec_of(tmp_path / "tiny", hidden_size=48)
    half = spec_of(tmp_path / "tiny", dtype="bfloat16", hidden_size=48)
    settings = SlimSamSettings(ratio=0.5)
    saved = scoring_bytes(wide, settings, embedding=True, beside=0) - scoring_bytes(
        half, settings, embedding=True, beside=0
    )
    decoder = wide.size().bytes - 4 * encoder_parameters(wide.config, {})
    assert saved == decoder // 2  # the encoder is float32 meanwhile
