"""Scores against plain loops, on two layers that are worked by hand."""

import pytest
import torch
from compress.compressors.pruning.gradients import Gradients
from compress.compressors.pruning.groups import Group, Slice
from compress.compressors.pruning.scores import scored_tensors, scores
from compress.errors import StageError
from torch import nn


def toy(seed=0):
    """Two linears with a norm between them; six inner channels."""
    module = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def inner_group(**changes):
    own = torch.arange(6)
    slices = (
        Slice("0", "weight", 0, own), Slice("0", "bias", 0, own, scored=False),
        Slice("1", "weight", 0, own), Slice("1", "bias", 0, own, scored=False),
        Slice("2", "weight", 1, own),
    )  # fmt: skip
    values = {"name": "0", "kind": "ff", "size": 6, "slices": slices, "label": (), "block": 0, **changes}
    return Group(**values)


def gradients_of(module, x, target):
    """Brute force: the gradient of every sample by itself, added up in a loop."""
    sums = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    for row, wanted in zip(x, target, strict=True):
        loss = nn.functional.cross_entropy(module(row[None]), wanted[None], reduction="sum")
        found = torch.autograd.grad(loss, list(module.parameters()))
        for name, value in zip(sums, found, strict=True):
            sums[name] += value
    return Gradients(sums, 0.0, len(x))


def data(samples=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 4, generator=generator), torch.arange(samples) % 3


def test_taylor_scores_are_those_of_a_plain_loop():
    module = toy()
    gradients = gradients_of(module, *data())
    module.requires_grad_(False)
    expected = []
    for k in range(6):
        first = sum(abs(float(module[0].weight[k, i] * gradients.of("0.weight")[k, i])) for i in range(4))
        norm = abs(float(module[1].weight[k] * gradients.of("1.weight")[k]))
        second = sum(abs(float(module[2].weight[j, k] * gradients.of("2.weight")[j, k])) for j in range(3))
        expected.append((first + norm + second) / 3)
    found = scores([inner_group()], module, gradients, importance="taylor", normalizer="none")
    assert found["0"].tolist() == pytest.approx(expected, rel=1e-5)
    normalised = scores([inner_group()], module, gradients, importance="taylor", normalizer="mean")["0"]
    mean = sum(expected) / 6
    assert normalised.tolist() == pytest.approx([value / mean for value in expected], rel=1e-5)
    assert float(normalised.mean()) == pytest.approx(1.0)


def test_the_absolute_value_is_taken_of_the_sum_over_samples():
    module = toy()
    one = gradients_of(module, *data(1))
    opposite = Gradients({name: value - value for name, value in one.sums.items()}, 0.0, 2)
    found = scores([inner_group()], module, opposite, importance="taylor", normalizer="mean")["0"]
    assert found.tolist() == [0.0] * 6  # also no division by the mean, which is 0


def test_magnitude_is_the_sum_of_squares():
    module = toy().requires_grad_(False)
    found = scores([inner_group()], module, None, importance="magnitude", normalizer="none")["0"]
    for k in range(6):
        rows = float((module[0].weight[k] ** 2).sum()), float(module[1].weight[k] ** 2)
        expected = (sum(rows) + float((module[2].weight[:, k] ** 2).sum())) / 3
        assert float(found[k]) == pytest.approx(expected, rel=1e-5)


def test_positions_of_one_channel_are_added_and_those_of_none_are_left_out():
    module = toy()
    owner = torch.tensor([0, 1, 2, 0, 1, -1])
    group = inner_group(size=3, slices=(Slice("0", "weight", 0, owner),))
    found = scores([group], module, None, importance="magnitude", normalizer="none")["0"]
    squares = (module[0].weight.detach() ** 2).sum(1)
    expected = [squares[0] + squares[3], squares[1] + squares[4], squares[2]]
    assert found.tolist() == pytest.approx([float(value) for value in expected])


def test_only_scored_slices_count_and_have_gradients():
    module, group = toy(), inner_group()
    assert scored_tensors([group]) == ["0.weight", "1.weight", "2.weight"]
    found = scores([group], module, None, importance="magnitude", normalizer="none")["0"]
    with torch.no_grad():
        module[0].bias.mul_(100)
        module[1].bias.mul_(100)
    again = scores([group], module, None, importance="magnitude", normalizer="none")["0"]
    assert torch.equal(found, again)


def test_convolutions_are_summed_over_input_channels_and_window():
    conv = nn.Conv2d(3, 4, 2)
    module = nn.Sequential(conv)
    group = Group("0", "width", 4, (Slice("0", "weight", 0, torch.arange(4)),), ())
    found = scores([group], module, None, importance="magnitude", normalizer="none")["0"]
    assert torch.allclose(found, conv.weight.detach().pow(2).sum((1, 2, 3)))


def test_a_factor_on_a_layer_goes_away_with_its_own_mean_and_stays_without():
    module, gradients = toy(), gradients_of(toy(), *data())
    larger = Gradients({name: 10 * value for name, value in gradients.sums.items()}, 0.0, 8)
    for normalizer, factor in (("mean", 1.0), ("none", 10.0)):
        one = scores([inner_group()], module, gradients, importance="taylor", normalizer=normalizer)["0"]
        ten = scores([inner_group()], module, larger, importance="taylor", normalizer=normalizer)["0"]
        assert torch.allclose(ten, factor * one, rtol=1e-5)


def test_half_precision_weights_are_scored_in_float32():
    module = toy()
    with torch.no_grad():
        module[0].weight.fill_(300.0)  # its square is beyond float16
    group = inner_group(slices=(Slice("0", "weight", 0, torch.arange(6)),))
    found = scores([group], module.half(), None, importance="magnitude", normalizer="none")["0"]
    assert found.dtype == torch.float32
    assert found.tolist() == [360000.0] * 6


def test_what_cannot_be_scored_is_told():
    module, group = toy(), inner_group(slices=(Slice("0", "bias", 0, torch.arange(6), scored=False),))
    with pytest.raises(StageError, match="0: none of the tensors"):
        scores([group], module, None, importance="magnitude", normalizer="none")
    with pytest.raises(ValueError, match="gradients"):
        scores([inner_group()], module, None, importance="taylor", normalizer="none")
    with torch.no_grad():
        module[0].weight[0, 0] = float("inf")
    with pytest.raises(StageError, match="0: the scores"):
        scores([inner_group()], module, None, importance="magnitude", normalizer="none")
