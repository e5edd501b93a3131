"""The formulas and schedules of the aligning, by hand."""

import math

import pytest
import torch
from compress.compressors.pruning.sam.losses import (
    bottleneck_loss,
    embedding_loss,
    epoch_of,
    feature_share,
    output_loss,
)


def _shares(phase, count, **given):
    return [feature_share(phase, epoch, **{"weight": 0.5, "epochs": 10, **given}) for epoch in range(count)]


def test_the_first_share_is_constant_for_ten_epochs():
    assert _shares("embedding", 12) == [0.5] * 10 + [0.0, 0.0]
    assert _shares("embedding", 3, weight=0.25, epochs=2) == [0.25, 0.25, 0.0]


def test_the_second_share_falls_to_0():
    assert _shares("bottleneck", 12) == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0, 0, 0])
    assert _shares("bottleneck", 4, weight=0.0, epochs=4) == [0.75, 0.5, 0.25, 0.0]
    assert _shares("bottleneck", 2, epochs=1) == [0.0, 0.0]


def test_outputs_alone_have_no_features():
    assert _shares("outputs", 2) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("step", "batch", "images", "epoch"),
    [(0, 4, 10, 0), (2, 4, 10, 0), (3, 4, 10, 1), (5, 4, 10, 2), (4, 4, 16, 1), (1, 8, 3, 2)],
)
def test_a_step_is_in_the_epoch_in_which_it_begins(step, batch, images, epoch):
    assert epoch_of(step, batch, images) == epoch


def _at(value):
    return torch.full((2, 3, 4, 4), float(value))


def test_the_output_is_one_mean():
    assert float(output_loss(_at(3), _at(1))) == 4.0


def test_the_first_loss():
    """0.75 * 2^2 + 0.25 * (1 + 2 + 4)."""
    features = {"windowed": torch.tensor(1.0), "global": torch.tensor(2.0), "inner": torch.tensor(4.0)}
    assert float(embedding_loss(_at(3), _at(1), features, 0.25)) == pytest.approx(4.75)


def test_the_second_loss():
    """0.9 * (1.5 + 1^2) + 0.1 * 2^2: the original's output counts with 1 - a."""
    found = bottleneck_loss(_at(3), _at(1), _at(2), {"stream": torch.tensor(1.5)}, 0.9)
    assert float(found) == pytest.approx(2.65)


def test_what_weighs_nothing_gives_no_gradient_even_where_it_is_not_finite():
    output = _at(1).requires_grad_()
    infinite = (output * math.inf).sum()
    embedding_loss(output, _at(0), {"inner": infinite}, 0.0).backward()
    assert torch.isfinite(output.grad).all() and float(output.grad.abs().max()) > 0
    alone = embedding_loss(_at(math.inf), _at(0), {"inner": torch.tensor(2.0)}, 1.0)
    assert float(alone) == 2.0


def test_targets_take_no_gradient():
    ours, theirs, third = (_at(value).requires_grad_() for value in (3, 1, 2))
    bottleneck_loss(ours, theirs, third, {"stream": torch.tensor(0.0)}, 0.5).backward()
    assert ours.grad is not None and theirs.grad is None and third.grad is None
