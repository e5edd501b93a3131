"""Running statistics against numbers worked by hand, and against all data at once."""

from __future__ import annotations

import pytest
import torch
from compress.calibration.statistics import ChannelAbsMax, Gram, RowSample, TokenAbsMax

# Two items of two tokens of two channels; the first item is at t = 900, the second at t = 100.
X = torch.tensor([[[1.0, -4.0], [-2.0, 3.0]], [[0.0, 0.5], [0.25, -6.0]]])
T = torch.tensor([900.0, 100.0])


def test_channel_maximum_by_hand():
    statistic = ChannelAbsMax(per_timestep=True)
    statistic.update(X, T)
    assert statistic.maximum.tolist() == [2.0, 6.0]
    assert {time: values.tolist() for time, values in statistic.by_timestep.items()} == {
        900.0: [2.0, 4.0],
        100.0: [0.25, 6.0],
    }
    statistic.update(torch.tensor([[[5.0, 0.0]]]), torch.tensor([900.0]))
    assert statistic.maximum.tolist() == [5.0, 6.0]
    assert statistic.by_timestep[900.0].tolist() == [5.0, 4.0]


def test_floor():
    statistic = ChannelAbsMax()
    statistic.update(torch.tensor([[[1e-7, 2.0]]]), torch.tensor([0.0]))
    assert statistic.floored().tolist() == pytest.approx([1e-3, 2.0])
    with pytest.raises(ValueError, match="no batch"):
        ChannelAbsMax().floored()


def test_range_averages_by_hand():
    statistic = ChannelAbsMax(ranges=[(0, 500), (501, 1000)], momentum=0.75)
    statistic.update(X, T)  # low: [0.25, 6]; high: [2, 4]
    both = torch.tensor([[[4.0, 0.0]], [[2.0, 0.0]]])
    statistic.update(both, torch.tensor([600.0, 501.0]))  # batch mean of the token maxima: [3, 0]
    expected = torch.tensor([[0.25, 6.0], [0.75 * 2 + 0.25 * 3, 0.75 * 4]])
    torch.testing.assert_close(statistic.range_averages(), expected)


def test_range_averages_replace_zeros_and_name_an_empty_range():
    statistic = ChannelAbsMax(ranges=[(0, 500)])
    statistic.update(torch.tensor([[[0.0, 2.0]]]), torch.tensor([500.0]))
    torch.testing.assert_close(statistic.range_averages(), torch.tensor([[1e-5, 2.0]]))
    empty = ChannelAbsMax(ranges=[(0, 500), (501, 1000)])
    empty.update(X[1:], T[1:])
    with pytest.raises(ValueError, match="501 to 1000"):
        empty.range_averages()


def test_token_maximum_by_hand():
    statistic = TokenAbsMax()
    statistic.update(X, T)
    assert {time: values.tolist() for time, values in statistic.by_timestep.items()} == {
        900.0: [4.0, 3.0],
        100.0: [0.5, 6.0],
    }
    statistic.update(torch.tensor([[[9.0, 0.0], [0.0, 1.0]]]), torch.tensor([900.0]))
    assert statistic.by_timestep[900.0].tolist() == [9.0, 3.0]
    assert statistic.spread()[900.0] == pytest.approx(9 / 6)


def test_gram_by_hand_and_in_parts():
    gram = Gram()
    gram.update(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]]), torch.tensor([0.0]))
    assert gram.matrix.tolist() == [[10.0, -1.0], [-1.0, 5.0]]
    assert gram.rows == 2
    assert gram.mean().tolist() == [[5.0, -0.5], [-0.5, 2.5]]
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = Gram()
    for item in x.split(2):
        parts.update(item, torch.zeros(2))
    flat = x.reshape(-1, 8).float()
    torch.testing.assert_close(parts.matrix, flat.T @ flat)
    assert parts.matrix.dtype == torch.float32


def rows_of(seed, size=4, batches=10):
    sampler = RowSample(size, torch.Generator().manual_seed(seed))
    for index in range(batches):
        x = torch.arange(6.0).reshape(2, 3, 1) + 6 * index
        sampler.update(x, torch.tensor([float(index), float(index) + 0.5]))
    return sampler


def test_row_sample_keeps_everything_while_there_is_room():
    sampler = rows_of(0, size=100, batches=3)
    assert sampler.rows.flatten().tolist() == list(range(18))
    assert sampler.timesteps.tolist() == [
        0,
        0,
        0,
        0.5,
        0.5,
        0.5,
        1,
        1,
        1,
        1.5,
        1.5,
        1.5,
        2,
        2,
        2,
        2.5,
        2.5,
        2.5,
    ]


def test_row_sample_is_seeded_and_keeps_rows_with_their_timesteps():
    assert torch.equal(rows_of(3).rows, rows_of(3).rows)
    assert not torch.equal(rows_of(3).rows, rows_of(4).rows)
    sampler = rows_of(5)
    assert sampler.seen == 60
    assert len(set(sampler.rows.flatten().tolist())) == 4
    for value, time in zip(sampler.rows.flatten().tolist(), sampler.timesteps.tolist(), strict=True):
        assert time == value // 6 + (0.5 if value % 6 >= 3 else 0.0)


def test_row_sample_is_uniform():
    counts = torch.zeros(60)
    for seed in range(600):
        counts[rows_of(seed).rows.flatten().long()] += 1
    assert counts.sum() == 2400
    # Each row is kept with probability 4/60: 40 times in 600, standard deviation 6.1.
    assert counts.min() > 40 - 4.5 * 6.1
    assert counts.max() < 40 + 4.5 * 6.1


def test_row_sample_does_not_depend_on_how_the_rows_are_batched():
    x = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))
    whole, parts = (RowSample(7, torch.Generator().manual_seed(1)) for _ in range(2))
    whole.update(x, torch.arange(8.0))
    for item, time in zip(x.split(2), torch.arange(8.0).split(2), strict=True):
        parts.update(item, time)
    assert torch.equal(whole.rows, parts.rows)
    assert torch.equal(whole.timesteps, parts.timesteps)


def test_row_sample_needs_room():
    with pytest.raises(ValueError, match="at least 1"):
        RowSample(0, torch.Generator())
