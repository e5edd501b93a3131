"""A training that ends with its best weights, at rates that follow from what was noted."""

import json
import struct

import pytest
import torch
from compress.compressors.recovery.best import BestWeights, Choosing, best_step
from compress.compressors.recovery.state import DamagedStateError
from compress.errors import StageError
from compress.progress import SilentProgress
from torch import nn


class _Told(SilentProgress):
    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


def _values(trainable):
    return {name: item.detach().clone() for name, item in trainable.parameters().items()}


def _equal(one, other):
    return all(torch.equal(item, other[name]) for name, item in one.items())


def _lower(value, other):
    return value < other


class _Script:
    """Values of steps; notes after every one that it has a value for, and keeps the weights of then."""

    def __init__(self, trainable, values):
        self.trainable, self.values, self.seen = trainable, values, {}

    def __call__(self, done, _):
        if done not in self.values:
            return None
        self.seen[done] = _values(self.trainable)
        return [done, self.values[done]]


def _choosing(rate=lambda done, rows: 1e-2):
    return Choosing(_lower, rate)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def test_of_equally_good_rows_the_first_is_the_best():
    assert best_step([[0, 3.0], [4, 2.0], [8, 2.0], [9, 5.0]], _lower) == 4
    assert best_step([[0, 1.0], [4, float("nan")]], _lower) == 0


@pytest.mark.parametrize(("values", "best"), [({0: 5, 7: 1, 14: 2, 20: 3}, 7), ({0: 5, 20: 4}, 20)])
def test_the_result_has_the_weights_of_the_best_row(values, best, regression, trained, settings, tmp_path):
    ours = regression()
    watch = _Script(ours, values)
    result = trained(ours, tmp_path, settings(), watch=watch, choosing=_choosing())
    assert _equal(_values(ours), watch.seen[best])
    assert [row[0] for row in result.rows] == list(values) and len(result.losses) == 20
    kept = {0, best} if best == 20 else {best}  # the state of step 18 names the first still
    assert {path.name for path in tmp_path.glob("best-*")} == {f"best-{step}.safetensors" for step in kept}


def test_a_training_that_made_it_worse_ends_where_it_began(regression, trained, settings, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        ours, before = regression(dtype=dtype), regression(dtype=dtype)
        trained(
            ours, tmp_path / str(dtype), settings(), watch=_Script(ours, {0: 1, 20: 2}), choosing=_choosing()
        )
        assert _equal(_values(before), _values(ours))


def test_rates_follow_from_the_rows_before(regression, trained, settings, tmp_path):
    def rate(done, rows):
        assert all(row[0] <= done for row in rows)
        return 1e-2 / 2 ** len(rows)

    ours, by_hand = regression(), regression()
    result = trained(
        ours, tmp_path, settings(steps=6, weight_decay=0.0, clip_norm=None), choosing=_choosing(rate),
        watch=_Script(ours, {0: 5, 2: 4, 5: 3, 6: 2}),
    )  # fmt: skip
    assert result.rates == [5e-3, 5e-3, 2.5e-3, 2.5e-3, 2.5e-3, 1.25e-3]
    by_hand.module.requires_grad_(True)
    optimizer = torch.optim.Adam(by_hand.module.parameters())
    for step, value in enumerate(result.rates):
        optimizer.param_groups[0]["lr"] = value
        optimizer.zero_grad()
        by_hand.loss(by_hand.batch(step, 0, 1))[0].backward()
        optimizer.step()
    assert all(
        torch.allclose(item, by_hand.parameters()[name], atol=1e-6)
        for name, item in ours.parameters().items()
    )


@pytest.mark.parametrize("parts", [1, 4])
def test_losses_can_be_summed_over_a_batch(parts, regression, trained, settings, tmp_path):
    """Of losses so small that Adam's epsilon, which does not grow with them, counts."""

    def small(factor):
        made = regression()
        loss = made.loss

        def scaled(batch):
            value, shown = loss(batch)
            return value * factor, shown

        made.loss = scaled
        return made

    given = settings(accumulate=parts, weight_decay=0.0, clip_norm=None)
    summed, mean, eight = small(1e-8), small(1e-8), small(8e-8)
    one = trained(summed, tmp_path / "1", given, summed=True)
    two = trained(mean, tmp_path / "2", given)
    trained(eight, tmp_path / "3", given)
    pairs = [(summed.parameters()[name], eight.parameters()[name], mean.parameters()[name]) for name in
             mean.parameters()]  # fmt: skip
    assert all(torch.allclose(ours, wanted, atol=1e-7) for ours, wanted, _ in pairs)
    assert max((ours - other).abs().max().item() for ours, _, other in pairs) > 1e-3
    assert one.losses[0] == pytest.approx(two.losses[0], rel=1e-6)  # what is recorded stays the mean


_VALUES = {0: 9, 2: 7, 4: 8, 5: 3, 8: 2, 9: 1, 13: 4, 16: 0.5, 20: 6}
"""A state every 6 steps: the best of the first is older, those of 8 and 9 are newer than it."""


def _stopping(trainable, at):
    whole = trainable.batch

    def batch(step, part, parts):
        if step == at:
            raise KeyboardInterrupt
        return whole(step, part, parts)

    trainable.batch = batch
    return trainable


def _cut(regression, trained, settings, folder, at):
    ours = _stopping(regression(dropout=0.3), at)
    with pytest.raises(KeyboardInterrupt):
        trained(ours, folder, settings(), watch=_Script(ours, _VALUES), choosing=_choosing())


@pytest.fixture
def whole(regression, trained, settings, tmp_path):
    """Return (weights, rows) of a training that nobody stopped."""
    ours = regression(dropout=0.3)
    found = trained(ours, tmp_path / "whole", settings(), watch=_Script(ours, _VALUES), choosing=_choosing())
    return _values(ours), found.rows


@pytest.mark.parametrize(("at", "start"), [(4, 0), (6, 6), (8, 6), (11, 6), (13, 12), (17, 12), (19, 18)])
def test_going_on_ends_with_the_same_bytes(at, start, whole, regression, trained, settings, tmp_path):
    _cut(regression, trained, settings, tmp_path / "cut", at)
    ours, told = regression(dropout=0.3), _Told()
    result = trained(
        ours, tmp_path / "cut", settings(), watch=_Script(ours, _VALUES), choosing=_choosing(), progress=told
    )
    assert result.resumed_at == start and not told.warnings
    assert _equal(_values(ours), whole[0]) and result.rows == whole[1]
    assert [path.name for path in (tmp_path / "cut").glob("best-*")] == ["best-16.safetensors"]


def test_the_best_of_the_state_stays_until_a_newer_state_stands(regression, trained, settings, tmp_path):
    _cut(regression, trained, settings, tmp_path, 11)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-5.safetensors", "best-9.safetensors", "training.safetensors",
    ]  # fmt: skip
    _cut(regression, trained, settings, tmp_path, 14)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-9.safetensors", "training.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("damage", [_flip, lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
def test_damaged_best_weights_are_told_and_the_training_starts_over(
    damage, whole, regression, trained, settings, tmp_path
):
    folder = tmp_path / "cut"
    _cut(regression, trained, settings, folder, 11)
    damage(folder / "best-5.safetensors")
    ours, told = regression(dropout=0.3), _Told()
    result = trained(
        ours, folder, settings(), watch=_Script(ours, _VALUES), choosing=_choosing(), progress=told
    )
    assert result.resumed_at == 0
    assert len(told.warnings) == 1 and "best-5.safetensors" in told.warnings[0]
    assert told.warnings[0].endswith("the training starts over")
    assert _equal(_values(ours), whole[0])


def test_best_weights_newer_than_the_state_may_be_damaged(whole, regression, trained, settings, tmp_path):
    folder = tmp_path / "cut"
    _cut(regression, trained, settings, folder, 11)
    _flip(folder / "best-9.safetensors")
    ours, told = regression(dropout=0.3), _Told()
    result = trained(
        ours, folder, settings(), watch=_Script(ours, _VALUES), choosing=_choosing(), progress=told
    )
    assert result.resumed_at == 6 and not told.warnings
    assert _equal(_values(ours), whole[0])


def test_best_weights_that_vanish_meanwhile_are_an_error(regression, trained, settings, tmp_path):
    ours = regression()
    script = _Script(ours, {0: 1, 20: 2})

    def watch(done, weights):
        if done == 20:
            (tmp_path / "best-0.safetensors").unlink()
        return script(done, weights)

    with pytest.raises(StageError, match="best-0.safetensors") as caught:
        trained(ours, tmp_path, settings(), watch=watch, choosing=_choosing())
    assert "starts over" in caught.value.hint


def test_best_weights_are_safetensors_and_of_one_training(tmp_path):
    parameters = {"a": nn.Parameter(torch.arange(3.0)), "b": nn.Parameter(torch.ones(2, 2))}
    kept = BestWeights(tmp_path, "key", parameters, _lower)
    kept.offer([[0, 3.0]])
    data = (tmp_path / "best-0.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["best"])
    assert about.keys() == {"key", "step", "sha256"} and (about["key"], about["step"]) == ("key", 0)
    with torch.no_grad():
        parameters["a"].zero_()
    kept.offer([[0, 3.0], [1, 4.0]])  # is not better, so nothing is written
    assert [path.name for path in tmp_path.iterdir()] == ["best-0.safetensors"]
    kept.apply(0)
    assert torch.equal(parameters["a"], torch.arange(3.0))
    with pytest.raises(DamagedStateError, match="of another training"):
        BestWeights(tmp_path, "other", parameters, _lower).read(0)
    (tmp_path / "best-0.safetensors").rename(tmp_path / "best-1.safetensors")
    with pytest.raises(DamagedStateError, match="of another training"):
        kept.read(1)


def test_who_does_not_write_only_reads(tmp_path):
    parameters = {"a": nn.Parameter(torch.ones(2))}
    reader = BestWeights(tmp_path, "key", parameters, _lower, writes=False)
    reader.offer([[0, 3.0]])
    assert not list(tmp_path.iterdir())
    BestWeights(tmp_path, "key", parameters, _lower).offer([[0, 3.0]])
    reader.settle([])
    assert torch.equal(reader.read(0)["a"], torch.ones(2))
