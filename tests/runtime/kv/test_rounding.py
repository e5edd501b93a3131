"""Rounding of compressed states: the bound on the error, the directions of groups, packing, the gradient."""

from __future__ import annotations

import pytest
import torch
from compress.runtime.kv.rounding import (
    PackedStates,
    fake_quantize,
    floats_of,
    from_groups,
    grid_of,
    integers_of,
    to_groups,
)

AXES = ["tokens", "channels"]


def _states(seed=0, batch=2, tokens=24, rank=11):
    return torch.randn(batch, tokens, rank, generator=torch.Generator().manual_seed(seed))


CASES = {
    "around zero": _states(),
    "mean 5": _states() + 5,
    "mean -300": _states() * 0.1 - 300,
    "large": _states() * 1e4,
    "tiny": _states() * 1e-6,
    "positive": _states().abs(),
    "one outlier": _states() * torch.tensor([1.0] * 10 + [1e3]),
    "constant": torch.full((2, 24, 11), 0.1),
    "zero": torch.zeros(2, 24, 11),
    "constant groups": torch.arange(66.0).view(2, 3, 1, 11).expand(2, 3, 8, 11).reshape(2, 24, 11),
}  # fmt: skip


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_no_element_is_off_by_more_than_half_a_step(case, bits, axis):
    groups = to_groups(CASES[case], axis, 4 if axis == "channels" else 8)
    scale, offset = grid_of(groups, bits)
    assert scale.dtype == offset.dtype == torch.float16
    assert torch.isfinite(scale).all()
    assert torch.isfinite(offset).all()
    integers = integers_of(groups, scale, offset, bits)
    assert 0 <= int(integers.min()) <= int(integers.max()) < 2**bits
    error = (floats_of(integers, scale, offset) - groups).abs()
    slack = 2e-7 * groups.abs().amax()  # of float32 itself
    assert (error <= scale.float() / 2 + slack).all()
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    rounding = groups.abs().amax(-1, keepdim=True) * 2**-10 + 2**-24
    assert (scale.float() <= (span + rounding) / (2**bits - 1) * (1 + 2**-10) + 2**-24).all(), (
        "no step is wasted"
    )


def test_an_offset_is_never_above_a_minimum():
    """At zeros of both signs, between the smallest float16 numbers, and at the largest one, too."""
    values = torch.tensor(
        [0.0, -0.0, 1e-9, -1e-9, 3e-8, -3e-8, 0.1, -0.1, 1000.3, -1000.3, 65504.0, -65504.0]
    )
    scale, offset = grid_of(torch.stack([values, values + values.abs() * 0.01], dim=-1), 4)
    assert (offset[:, 0].float() <= values).all()
    assert (values - offset[:, 0].float() <= values.abs() * 2**-10 + 2**-24).all()
    assert (scale >= 0).all()


def test_the_ends_of_a_range_are_kept():
    """A group that float16 can hold: minimum and maximum come back, and what lies on the grid."""
    c = torch.tensor([[[5.0], [5.5], [6.0], [6.5]]])
    assert torch.equal(fake_quantize(c, 2, "tokens", 4), c)
    assert torch.equal(fake_quantize(c.transpose(1, 2), 2, "channels", 4), c.transpose(1, 2))


def test_what_no_float16_can_hold_stays_finite():
    c = _states() * 1e6
    for axis in AXES:
        assert torch.isfinite(fake_quantize(c, 4, axis, 8)).all()


def test_groups_of_keys_run_along_tokens_and_those_of_values_along_channels():
    """An outlier costs precision in its own group alone."""
    c = _states(tokens=16, rank=8)
    c[0, 3, 5] = 1000.0
    for axis, hurt in (("tokens", (slice(0, 8), slice(5, 6))), ("channels", (slice(3, 4), slice(4, 8)))):
        error = (fake_quantize(c, 4, axis, 8 if axis == "tokens" else 4) - c)[0].abs()
        assert error[hurt].max() > 1
        error[hurt] = 0
        assert error.max() < 0.25


@pytest.mark.parametrize("axis", AXES)
def test_groups_and_back(axis):
    c = _states()
    assert torch.equal(from_groups(to_groups(c, axis, 4), axis, 11), c)
    assert to_groups(c, axis, 4).shape == ((2, 6, 11, 4) if axis == "tokens" else (2, 24, 3, 4))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_states_are_what_training_rounds_to(axis, bits, dtype):
    c = _states(rank=11).to(dtype)
    packed = PackedStates.of(c, bits, axis, 4)
    assert packed.tokens == 24
    assert packed.integers.dtype == torch.uint8
    expected = fake_quantize(c, bits, axis, 4)
    assert expected.dtype == dtype
    for tokens in (24, 9, 8, 1):
        assert torch.equal(packed.read(tokens, dtype), expected[:, :tokens])


@pytest.mark.parametrize(("bits", "size"), [(4, 2), (2, 1)])
def test_integers_are_packed(bits, size):
    """Four tokens of a key's channel take `bits / 2` bytes; eleven channels of a value a whole byte more."""
    keys = PackedStates.of(_states(), bits, "tokens", 4)
    assert keys.integers.shape == (2, 6, 11, size)
    assert keys.scale.shape == keys.offset.shape == (2, 6, 11)
    values = PackedStates.of(_states(), bits, "channels", 4)
    assert values.integers.shape == (2, 24, -(-11 * bits // 8))
    assert values.scale.shape == values.offset.shape == (2, 24, 3)


@pytest.mark.parametrize("axis", AXES)
def test_packed_states_are_extended_and_chosen(axis):
    c, group = _states(), 4
    first, later = (PackedStates.of(part.contiguous(), 4, axis, group) for part in (c[:, :8], c[:, 8:]))
    whole = first.extended(later)
    assert torch.equal(whole.read(24, c.dtype), PackedStates.of(c, 4, axis, group).read(24, c.dtype))
    assert torch.equal(whole.changed(lambda t: t[[1]]).read(24, c.dtype), whole.read(24, c.dtype)[[1]])


def test_tokens_after_the_last_whole_group_stay_as_they_are():
    c = _states(tokens=11)
    rounded = fake_quantize(c, 2, "tokens", 4)
    assert torch.equal(rounded[:, 8:], c[:, 8:])
    assert not torch.equal(rounded[:, :8], c[:, :8])
    assert fake_quantize(c, 2, "tokens", 16) is c


@pytest.mark.parametrize("axis", AXES)
def test_the_gradient_passes_but_at_the_ends_of_a_range(axis):
    c = _states(batch=1, tokens=8, rank=8).requires_grad_()
    gradient = torch.randn(c.shape, generator=torch.Generator().manual_seed(1))
    fake_quantize(c, 4, axis, 4).backward(gradient)
    groups = to_groups(c.detach(), axis, 4)
    ends = (groups == groups.amin(-1, keepdim=True)) | (groups == groups.amax(-1, keepdim=True))
    ends = from_groups(ends, axis, 8)
    assert int(ends.sum()) == 2 * 16
    assert torch.equal(c.grad, gradient.masked_fill(ends, 0.0))


def test_the_gradient_of_the_tokens_behind_the_groups_passes():
    c = _states(batch=1, tokens=6, rank=3).requires_grad_()
    fake_quantize(c, 4, "tokens", 4).sum().backward()
    assert torch.equal(c.grad[:, 4:], torch.ones(1, 2, 3))
    assert int((c.grad[:, :4] == 0).sum()) == 2 * 3
